"""What artifacts must have in common to be merged."""

from collections.abc import Iterator, Mapping
from typing import Any

from store.artifact import Artifact
from store.errors import ArtifactMergeError
from store.manifest import Manifest

# Equal weights may go by several names.
_TEACHER_MAY_DIFFER = frozenset({"name", "revision", "licence"})
_SAMPLING_MUST_AGREE = ("views", "view_size", "views_version")


def check_alike(first: Artifact, other: Artifact) -> None:
    """Check that two artifacts are of the same teacher, preprocessing and kind of sampling.

    Args:
        first: of the inputs.
        other: one more.

    Raises:
        ArtifactMergeError: they differ; the message names the first difference.
    """
    one, two = _what_must_agree(first.manifest), _what_must_agree(other.manifest)
    for field, found, expected in _differences(two, one):
        advice = "Only embeddings of one teacher, made in one way, can be merged."
        if field.startswith("tensors."):
            advice = "Make them equal with `clip-embed-kd store convert --dtype`."
        raise ArtifactMergeError(f"{other.path.name}: {field} is {found}, {first.path.name} has {expected}. {advice}")


def _what_must_agree(manifest: Manifest) -> dict[str, Any]:
    data_set, sampling = manifest.data_set, manifest.sampling
    agree: dict[str, Any] = {
        "teacher": {k: v for k, v in manifest.teacher.model_dump().items() if k not in _TEACHER_MAY_DIFFER},
        "preprocessing": manifest.preprocessing,
        "sampling": {name: getattr(sampling, name) for name in _SAMPLING_MUST_AGREE},
        "data_set": {"classes_named": data_set.classes_named},
    }
    if sampling.views > 1:
        agree["sampling"]["seed"] = sampling.seed  # renderings are drawn from it
    if not data_set.classes_named:  # indices mean something within one data set only
        agree["data_set"] |= {name: getattr(data_set, name) for name in ("name", "config", "label_column")}
    embedding = manifest.tensors.get("sample/embedding")
    if embedding is not None:
        agree["tensors"] = {"sample/embedding": {"dtype": embedding.dtype}}
    return agree


def _differences(one: Any, two: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for name in {**one, **two}:
            if field == "" and name == "tensors" and (name not in one or name not in two):
                continue  # one of them has no samples
            yield from _differences(one.get(name), two.get(name), f"{field}.{name}" if field else name)
    elif one != two:
        yield field, one, two
