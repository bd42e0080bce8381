import json
from pathlib import Path

import pytest

import store
from tests.store.examples import all_tensors, class_tensors, make_manifest


def test_a_summary_names_everything_in_the_artifact(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    manifest = store.write_artifact(path, make_manifest(), all_tensors())
    summary = store.summarise(path)
    assert summary.manifest == json.loads(manifest.to_bytes())
    assert summary.rows() == [
        ("artifact", f"artifact.safetensors, {path.stat().st_size:,} bytes, format 1.0"),
        ("digest", f"{manifest.sha256()} (of the manifest)"),
        ("teacher", "owner/teacher, vit, licence not stated"),
        ("embedding", "4 values, pooling cls, float32"),
        ("data set", "owner/images, split train, 10 rows"),
        ("columns", "image, label"),
        ("sampling", "all images a class, seed 0, 2 view(s)"),
        ("images", "4 to 6 in a class"),
        ("classes", "3: class 0, class 1, class 2"),
        *((name, f"{array.dtype.name} {list(array.shape)}") for name, array in sorted(all_tensors().items())),
    ]


def test_many_classes_and_known_revisions_are_shortened(tmp_path: Path) -> None:
    example = make_manifest(1200)
    teacher = example.teacher.model_copy(update={"revision": "0123456789abcdef", "licence": "mit"})
    sampling = example.sampling.model_copy(update={"per_class": 100})
    manifest = example.model_copy(update={"teacher": teacher, "sampling": sampling})
    tensors = class_tensors(1200)
    tensors["class/count"][:] = 1000
    store.write_artifact(tmp_path / "artifact.h5", manifest, tensors)
    rows = dict(store.summarise(tmp_path / "artifact.h5").rows())
    assert rows["teacher"] == "owner/teacher at 0123456789ab, vit, licence mit"
    assert rows["sampling"] == "100 images a class, seed 0, 2 view(s)"
    assert rows["images"] == "1,000 in each class"
    assert rows["classes"] == "1,200: class 0, class 1, class 2, class 3, class 4, class 5, …"


def test_prompts_of_text_embeddings_are_shown(tmp_path: Path) -> None:
    text = store.TextInfo(prompts=("a photo of a {}.", "{}"), weights_sha256="d" * 64)
    store.write_artifact(tmp_path / "artifact.h5", make_manifest(3, text=text), class_tensors(3))
    rows = dict(store.summarise(tmp_path / "artifact.h5").rows())
    assert rows["text"] == "2 prompt(s), the first 'a photo of a {}.'"


def test_a_missing_artifact_has_no_summary(tmp_path: Path) -> None:
    with pytest.raises(store.ArtifactNotFoundError, match="does not exist"):
        store.summarise(tmp_path / "artifact.h5")
