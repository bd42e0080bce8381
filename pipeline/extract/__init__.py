"""Stage one: run the teacher once and write its embeddings into an artifact."""

from pipeline.extract.config import ExtractSettings
from pipeline.extract.processes import ShareDone
from pipeline.extract.run import ExtractResult, extract

__all__ = ["ExtractResult", "ExtractSettings", "ShareDone", "extract"]
