"""What a user can cause in the pipeline: one class, one line of text."""


class PipelineError(Exception):
    """A problem that the user can mend; its text says what, where and the next step."""
