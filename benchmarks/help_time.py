"""Time every command's --help, and `store inspect`, against a bare start of the interpreter.

    python benchmarks/help_time.py [ARTIFACT]

Prints, for each, the median over the runs of the seconds beyond the bare start that was timed just before it.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

CLI = Path(__file__).parent.parent / "cli.py"
COMMANDS = (
    *("", "extract", "distill", "plan", "evaluate", "predict", "export", "demo"),
    *("recipe", "recipe list", "recipe show"),
    *("store", "store inspect", "store verify", "store convert", "store merge", "store plot"),
)
RUNS = 11


def seconds(*arguments: str) -> float:
    """Run Python with these arguments; returns how long it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    lines = {f"{command} --help".strip(): [str(CLI), *command.split(), "--help"] for command in COMMANDS}
    if len(sys.argv) > 1:
        lines["store inspect ARTIFACT"] = [str(CLI), "store", "inspect", sys.argv[1]]
    for name, arguments in lines.items():
        beyond, bare = [], []
        for _ in range(RUNS):
            bare.append(seconds("-c", "pass"))
            beyond.append(seconds(*arguments) - bare[-1])
        print(f"{name:<24} {statistics.median(beyond):.3f} s beyond {statistics.median(bare):.3f} s")


if __name__ == "__main__":
    main()
