"""Stage two: train a student from an artifact. No teacher, and none of its libraries, is needed here."""

from pipeline.distill.config import DistillSettings
from pipeline.distill.run import DistillResult, distill

__all__ = ["DistillResult", "DistillSettings", "distill"]
