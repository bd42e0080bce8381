"""Stage one: run the teacher once and write its embeddings into an artifact, or check one."""

from pipeline.extract.check import check_artifact
from pipeline.extract.check_result import CheckResult
from pipeline.extract.config import CheckSettings, ExtractSettings
from pipeline.extract.processes import ShareDone
from pipeline.extract.run import ExtractResult, extract

__all__ = [
    "CheckResult",
    "CheckSettings",
    "ExtractResult",
    "ExtractSettings",
    "ShareDone",
    "check_artifact",
    "extract",
]
