"""The embedding store: artifacts that carry a teacher's embeddings, their statistics and their manifest.

Uses numpy, never torch, and knows nothing of training. These names are the whole public interface.
"""

from store.artifact import Artifact, RowBlocks, open_artifact, write_artifact
from store.errors import (
    ArtifactDigestError,
    ArtifactFormatError,
    ArtifactNotFoundError,
    ArtifactVersionError,
    ArtifactWriteError,
    StoreError,
)
from store.manifest import DataSetInfo, Manifest, SamplingInfo, TeacherInfo, TensorInfo
from store.statistics import ClassStatistics
from store.summary import Summary, summarise

__all__ = [
    "Artifact",
    "ArtifactDigestError",
    "ArtifactFormatError",
    "ArtifactNotFoundError",
    "ArtifactVersionError",
    "ArtifactWriteError",
    "ClassStatistics",
    "DataSetInfo",
    "Manifest",
    "RowBlocks",
    "SamplingInfo",
    "StoreError",
    "Summary",
    "TeacherInfo",
    "TensorInfo",
    "open_artifact",
    "summarise",
    "write_artifact",
]
