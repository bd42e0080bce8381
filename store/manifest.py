"""The manifest: typed metadata of an artifact, and its canonical JSON.

It records where the embeddings come from and what the tensors are. It holds no clock, no host and no
local path, so that the same extraction gives the same bytes.
"""

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from store.errors import ArtifactDigestError, ArtifactFormatError, ArtifactVersionError
from store.strict_json import parse_json

FORMAT_NAME: Final = "clip-embed-kd"
FORMAT_MAJOR: Final = 1
FORMAT_MINOR = 0
MAX_MANIFEST_BYTES = 32 * 1024 * 1024  # a million class names fit
_MAX_MEMBERS = 1000  # of `tensors` and `software`: there are about ten of each

Sha256 = str
_SHA256 = r"^[0-9a-f]{64}$"
# Every integer fits in int64: JSON's may have thousands of digits.
Natural = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]


class _Record(BaseModel):
    # A newer minor version may add fields: they are kept, so that a copy of the artifact keeps them.
    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class FormatVersion(_Record):
    """Name and version of the artifact format."""

    name: Literal["clip-embed-kd"] = FORMAT_NAME
    major: Literal[1] = FORMAT_MAJOR
    minor: Natural = FORMAT_MINOR


class TeacherInfo(_Record):
    """Which teacher made the embeddings, and how they were pooled."""

    name: str = Field(description="hub name, or the base name of a local folder")
    revision: str | None = Field(default=None, description="hub commit; none for a local folder")
    weights_sha256: Sha256 = Field(
        pattern=_SHA256, description="SHA-256 over name, shape and float32 values of the encoder's weights"
    )
    architecture: str
    pooling: str = Field(description="how one embedding is taken from the teacher's output")
    embed_dim: Positive
    precision: str = Field(description="arithmetic of the forward pass: float32, bfloat16")
    licence: str | None = None


class DataSetInfo(_Record):
    """Which images the embeddings are of."""

    name: str = Field(description="hub name, or the base name of a local folder")
    config: str | None = None
    revision: str | None = None
    split: str
    image_column: str
    label_column: str
    rows: Positive = Field(description="rows of the split, before sampling")
    classes_named: bool = Field(
        description="whether class names come from the data; if not, they are indices in decimal"
    )
    licence: str | None = None


class SamplingInfo(_Record):
    """Which of the data set's images were embedded."""

    per_class: Positive | None = Field(description="images asked for in each class; none: all")
    limit: Positive | None = Field(default=None, description="rows kept before sampling; none: all")
    seed: Natural
    rows: tuple[Natural, Natural] | None = Field(
        default=None,
        strict=False,
        description="first row of the split that was looked at, and the one after the last; absent where all were",
    )
    batch_size: Positive
    views: Positive = Field(default=1, description="renderings of each image; view 0 is the image itself")
    view_size: int | None = Field(default=None, ge=1, le=4096, description="side of an augmented view, in pixels")
    views_version: Positive | None = None
    short_classes: Natural = Field(default=0, description="classes with fewer images than per_class")
    skipped_images: Natural = Field(default=0, description="images that could not be decoded")
    images_sha256: Sha256 | None = Field(
        pattern=_SHA256,
        description="of the embedded images: their sorted unique pairs of sample key and class row (int32); "
        "none where a merge or a dropped class left them unknown",
    )


class HeadInfo(_Record):
    """How the ridge head was fitted."""

    penalty: float = Field(ge=0, description="λ, added to the eigenvalues of the scatter matrix")
    loo_error: float = Field(ge=0, description="mean squared leave-one-out error over images and classes")
    loo_accuracy: float = Field(ge=0, le=1, description="share of images that are classified rightly when left out")


class TextInfo(_Record):
    """How the text embeddings of the classes were made."""

    prompts: tuple[str, ...] = Field(
        strict=False, min_length=1, description="templates, each with one {} for the class name; averaged over"
    )
    weights_sha256: Sha256 = Field(
        pattern=_SHA256, description="SHA-256 over name, shape and float32 values of the text tower's weights"
    )


class SourceInfo(_Record):
    """One of the artifacts that this one was made from."""

    manifest_sha256: Sha256 = Field(pattern=_SHA256)
    data_set: DataSetInfo
    sampling: SamplingInfo


class TensorInfo(_Record):
    """Type, shape and digest of one tensor."""

    dtype: str
    shape: tuple[Natural, ...] = Field(strict=False, fail_fast=True)
    sha256: Sha256 = Field(default="0" * 64, pattern=_SHA256, description="of the little-endian bytes")


class Manifest(_Record):
    """All metadata of one artifact."""

    format: FormatVersion = FormatVersion()
    teacher: TeacherInfo
    data_set: DataSetInfo
    preprocessing: dict[str, Any] = Field(description="the teacher's image processor and its settings")
    sampling: SamplingInfo
    head: HeadInfo | None = Field(default=None, description="absent where there is no head")
    text: TextInfo | None = Field(default=None, description="absent where no text embeddings were made")
    sources: tuple[SourceInfo, ...] = Field(
        default=(),
        strict=False,
        fail_fast=True,
        description="absent where the artifact was extracted; else what it was made from",
    )
    classes: tuple[str, ...] = Field(strict=False, min_length=1, fail_fast=True, description="class names in row order")
    tensors: dict[str, TensorInfo] = Field(default_factory=dict)
    software: dict[str, str] = Field(default_factory=dict, description="versions that made the artifact")

    @field_validator("classes")
    @classmethod
    def _unique(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        seen: set[str] = set()
        for name in classes:
            if name in seen:
                raise ValueError(f"class name {name!r} stands twice")
            seen.add(name)
        return classes

    def to_bytes(self) -> bytes:
        """Encode as canonical JSON: sorted keys, no spaces, UTF-8, no NaN.

        Returns:
            The bytes whose SHA-256 stands beside the manifest.
        """
        document = self.model_dump()  # mode="json" would turn NaN into null and a Path into text
        for name in ("head", "sources", "text"):
            if not document[name]:
                del document[name]
        for sampling in (document["sampling"], *(source["sampling"] for source in document.get("sources", ()))):
            if sampling["rows"] is None:
                del sampling["rows"]
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")

    def sha256(self) -> Sha256:
        """Return the SHA-256 of the canonical JSON: the artifact's digest, since all tensor digests are in it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_manifest(raw: bytes, sha256: str, where: str) -> Manifest:
    """Decode and check a manifest.

    Args:
        raw: canonical JSON as stored, UTF-8.
        sha256: the digest that stands beside it, in hexadecimal.
        where: file name, for messages.

    Returns:
        The manifest.

    Raises:
        ArtifactDigestError: the digest differs.
        ArtifactVersionError: another format, or a newer major version.
        ArtifactFormatError: not JSON, or fields are missing or wrong.
    """
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ArtifactDigestError(
            f"{where}: manifest has SHA-256 {found[:12]}…, {sha256[:12]!r}… is stored beside it. "
            "The file is damaged: extract it again."
        )
    document = parse_json(raw, where)
    _check_version(document, where)
    _check_members(document, where)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ArtifactFormatError(
            f"{where}: manifest field {field}: {first['msg']}. The file is damaged: extract it again."
        ) from None
    try:
        manifest.to_bytes()
    except ValueError as error:  # lone surrogates, or nested too deeply
        raise ArtifactFormatError(f"{where}: manifest cannot be encoded ({error}).") from None
    return manifest


def _check_version(document: dict[str, Any], where: str) -> None:
    version = document.get("format")
    name = version.get("name") if isinstance(version, dict) else None
    if name != FORMAT_NAME:
        raise ArtifactVersionError(f"{where}: manifest format is {name!r}, expected {FORMAT_NAME!r}.")
    major = version.get("major") if isinstance(version, dict) else None
    if major != FORMAT_MAJOR or type(major) is not int:  # true and 1.0 are equal to 1
        raise ArtifactVersionError(
            f"{where}: artifact format {major}, this program reads format {FORMAT_MAJOR}. "
            "Update clip-embed-kd, or extract again."
        )


def _check_members(document: dict[str, Any], where: str) -> None:
    for name in ("tensors", "software"):  # before each of them gets an error of its own
        members = document.get(name)
        if isinstance(members, dict) and len(members) > _MAX_MEMBERS:
            raise ArtifactFormatError(
                f"{where}: manifest field {name} has {len(members)} members, at most {_MAX_MEMBERS} are read."
            )
