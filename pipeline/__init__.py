"""The two stages around the store: `extract` runs the teacher once, `distill` trains the student."""
