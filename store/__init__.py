"""The embedding store: artifacts that carry a teacher's embeddings, their statistics and their manifest.

Uses numpy, never torch, and knows nothing of training. These names are the whole public interface.
"""

from store.artifact import Artifact, open_artifact
from store.convert import Conversion, ConvertResult, Loss, convert_artifact
from store.errors import (
    ArtifactDigestError,
    ArtifactFormatError,
    ArtifactMergeError,
    ArtifactNotFoundError,
    ArtifactVersionError,
    ArtifactWriteError,
    StoreError,
)
from store.manifest import DataSetInfo, HeadInfo, Manifest, SamplingInfo, SourceInfo, TeacherInfo, TensorInfo, TextInfo
from store.merge import MergeResult, merge_artifacts
from store.pairs import pairs_sha256, sort_pairs
from store.quantize import check_fits, sample_embeddings
from store.ridge import RidgeHead, fit_ridge
from store.statistics import ClassStatistics
from store.summary import Summary, summarise
from store.verify import verify_artifact
from store.writing import RowBlocks, check_destination, write_artifact

__all__ = [
    "Artifact",
    "ArtifactDigestError",
    "ArtifactFormatError",
    "ArtifactMergeError",
    "ArtifactNotFoundError",
    "ArtifactVersionError",
    "ArtifactWriteError",
    "ClassStatistics",
    "Conversion",
    "ConvertResult",
    "DataSetInfo",
    "HeadInfo",
    "Loss",
    "Manifest",
    "MergeResult",
    "RidgeHead",
    "RowBlocks",
    "SamplingInfo",
    "SourceInfo",
    "StoreError",
    "Summary",
    "TeacherInfo",
    "TensorInfo",
    "TextInfo",
    "check_destination",
    "check_fits",
    "convert_artifact",
    "fit_ridge",
    "merge_artifacts",
    "open_artifact",
    "pairs_sha256",
    "sample_embeddings",
    "sort_pairs",
    "summarise",
    "verify_artifact",
    "write_artifact",
]
