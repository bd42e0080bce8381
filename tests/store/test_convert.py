from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import store
from store import Conversion, convert
from tests.store.examples import (
    STORAGES,
    Tensors,
    all_tensors,
    assert_same_bits,
    class_tensors,
    document_of,
    file_names,
    int8_tensors,
    make_manifest,
    read_all,
    samples_of,
    save_foreign,
)
from tests.store.test_merged_rows import Images, draw_images, extract, fit_head, stored_as

DTYPES = ("float32", "float16", "int8")
SAMPLES = ("sample/embedding", "sample/key", "sample/label", "sample/scale")


def converted(path: Path, out: Path, conversion: Conversion, **options: Any) -> store.ConvertResult:
    """Convert, and verify what was made."""
    result = store.convert_artifact(path, out, conversion, **options)
    assert store.verify_artifact(out) == result.manifest.sha256()
    return result


def refused(path: Path, out: Path, conversion: Conversion, **options: Any) -> tuple[type[store.StoreError], str]:
    """Return why a conversion is refused; nothing may have changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(store.StoreError) as caught:
        store.convert_artifact(path, out, conversion, **options)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    return type(caught.value), str(caught.value)


def numbers_of(tensors: Tensors) -> NDArray[np.float32]:
    embeddings = tensors["sample/embedding"].astype(np.float32)
    return np.asarray(embeddings * tensors["sample/scale"][..., None] if "sample/scale" in tensors else embeddings)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: array for name, array in tensors.items() if name not in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", range(3))
def test_every_type_in_every_container_becomes_every_other(tmp_path: Path, source: int, dtype: str) -> None:
    images = draw_images(7, 0, views=2)
    plain = extract(tmp_path / "plain.safetensors", images, dtype=dtype, with_head=True)
    tensors = read_all(plain)
    numbers = numbers_of(tensors)
    path = tmp_path / f"path{STORAGES[source][0]}"
    manifest = converted(plain, path, Conversion(gzip=STORAGES[source][1])).manifest
    # Each type goes into each container, from one container or another.
    for index, target in enumerate((None, *DTYPES, "class only")):
        suffix, gzip = STORAGES[(source + index) % 3]
        out = tmp_path / f"out{index}{suffix}"
        expected = without(tensors, *SAMPLES) if target == "class only" else dict(tensors)
        if target in DTYPES and target != dtype:
            expected = without(expected, "sample/scale") | stored_as(target, numbers)
        conversion = Conversion(gzip=gzip, class_only=True) if target == "class only" else Conversion(target, gzip=gzip)
        result = converted(path, out, conversion)
        assert_same_bits(read_all(out), expected)
        assert result.manifest.model_copy(update={"tensors": manifest.tensors}) == manifest
        assert (result.loss is not None) == (target in DTYPES and target != dtype)
        assert (result.bytes_before, result.bytes_after) == (path.stat().st_size, out.stat().st_size)
        assert result.notes == ()
    assert len(file_names(tmp_path)) == 7


@pytest.mark.parametrize("tensors", [all_tensors(), int8_tensors()], ids=["float16", "int8"])
@pytest.mark.parametrize("gzip", [False, True])
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, tensors: Tensors, gzip: bool) -> None:
    first, middle, last = tmp_path / "a.safetensors", tmp_path / "b.h5", tmp_path / "c.safetensors"
    store.write_artifact(first, make_manifest(), tensors)
    converted(first, middle, Conversion(gzip=gzip))
    converted(middle, last, Conversion())
    assert first.read_bytes() == last.read_bytes()


def test_what_the_program_does_not_know_is_kept(path: Path) -> None:
    future: Tensors = {"future/x": np.arange(6, dtype=np.int8).reshape(2, 3), "sample/mood": np.arange(5.0, dtype="f4")}
    tensors = all_tensors() | future
    document = document_of(tensors)
    document["format"]["minor"] = 7
    document["sampling"]["weather"] = ["rain", 1]
    document["mood"] = {"good": True}
    save_foreign(path, document, tensors)
    out = path.with_name("out.h5")
    result = converted(path, out, Conversion(dtype="float32"))
    assert result.manifest.model_dump(exclude={"tensors"}) == store.open_artifact(path).manifest.model_dump(
        exclude={"tensors"}
    )
    assert result.manifest.model_extra == {"mood": {"good": True}}
    kept = without(tensors, "sample/embedding") | {"sample/embedding": tensors["sample/embedding"].astype(np.float32)}
    assert_same_bits(read_all(out), kept)
    assert set(converted(path, out, Conversion(class_only=True), overwrite=True).manifest.tensors) == (
        set(tensors) - set(SAMPLES) - {"sample/mood"}
    )
    note = "Not kept, since this program does not know their classes: future/x, sample/mood."
    result = converted(path, out, Conversion(drop_classes=("class 1",)), overwrite=True)
    assert result.notes[0] == note
    assert not {"future/x", "sample/mood"} & set(result.manifest.tensors)


def test_losses_are_those_of_a_plain_computation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_images(11, 3, views=2)
    images.embeddings[...] *= np.float32(1e-3)
    images.embeddings[4, 0], images.embeddings[5, 1] = 0, 1e-44  # stays zero; becomes zero
    extract(path, images, dtype="float32")
    monkeypatch.setattr(convert, "_COMPARED_ROWS", 4)
    monkeypatch.setattr(convert, "block_rows", lambda shape, dtype: 2)
    old, mean = read_all(path)["sample/embedding"].astype(np.float64), read_all(path)["class/mean"].astype(np.float64)
    for dtype in ("float16", "int8"):
        out = path.with_name("out.safetensors")
        loss = converted(path, out, Conversion(dtype), overwrite=True).loss
        new = numbers_of(read_all(out)).astype(np.float64)
        cosines = []
        for one, other in zip(old.reshape(-1, 4), new.reshape(-1, 4), strict=True):
            norms = np.linalg.norm(one) * np.linalg.norm(other)
            cosines.append(one @ other / norms if norms else float(not one.any() and not other.any()))
        nearest = [
            np.array([np.square(row - mean).sum(axis=1).argmin() for row in embeddings[::3, 0]])
            for embeddings in (old, new)
        ]
        assert loss is not None
        assert loss.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-12)
        assert loss.worst_cosine == pytest.approx(min(cosines), abs=1e-12) == pytest.approx(0)
        assert (loss.num_rows, loss.num_compared) == (11, 4)  # rows 0, 3, 6, 9
        assert loss.nearest_class_agreement == np.mean(nearest[0] == nearest[1])


def test_a_nearest_class_that_changes_is_counted(path: Path) -> None:
    # Steps of 0.01: 0.496 becomes 0.5, across the middle between the classes, 0.498.
    firsts = [0.1, 0.494, 0.496, 0.9]  # of view 0; view 1 and the dropped class decide nothing
    embeddings = np.array([[[first, 1.27, 0, 0], [0.5, 1.27, 0, 0]] for first in firsts], np.float32)
    means = np.array([[0, 1, 0, 0], [0.496, 1.27, 0, 0], [0.996, 1, 0, 0]], np.float32)
    tensors = class_tensors() | {"class/mean": means} | samples_of(embeddings)
    store.write_artifact(path, make_manifest(), tensors)
    loss = converted(path, path.with_name("out.h5"), Conversion("int8", drop_classes=("class 1",))).loss
    assert loss is not None
    assert (loss.nearest_class_agreement, loss.num_rows, loss.num_compared) == (0.75, 4, 4)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_largest_numbers_are_compared_without_a_warning(path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    means = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], np.float32) * np.float32(largest)
    embeddings = np.array([[[1, 0.6, 0, 0]], [[0.6, 1, 0, 0]]], np.float32) * np.float32(largest / 2)
    store.write_artifact(path, make_manifest(views=1), class_tensors() | {"class/mean": means} | samples_of(embeddings))
    loss = converted(path, path.with_name("out.h5"), Conversion("int8")).loss
    assert loss is not None
    assert (loss.nearest_class_agreement, loss.num_compared) == (1, 2)


@pytest.mark.parametrize("source", ["float32", "int8"])
def test_an_overflow_is_an_error_and_leaves_nothing(path: Path, source: str) -> None:
    images = draw_images(6, 0)
    images.embeddings[3, 0, 2] = -70_000
    extract(path, images, dtype=source)
    kind, message = refused(path, path.with_name("out.h5"), Conversion("float16"))
    assert kind is store.ArtifactWriteError
    assert message == f"{path.name}: an embedding reaches 7e+04, float16 ends at 6.55e+04. Pass --dtype float32."
    refused(path, path, Conversion("float16"), overwrite=True)


def kept_of(images: Images, dropped: tuple[str, ...]) -> Images:
    rows = [row for row, name in enumerate(images.names) if name not in dropped]
    return Images(images.keys[rows], [images.names[row] for row in rows], images.embeddings[rows])


@pytest.mark.parametrize("dropped", [("ant",), ("bee", "bee"), ("cat", "ant")])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("class_only", [False, True])
def test_without_some_classes_is_one_extraction_without_them(
    tmp_path: Path, dropped: tuple[str, ...], dtype: str, class_only: bool
) -> None:
    images = draw_images(20, 1, views=2)
    images.keys[7] = images.keys[6]  # an image under two labels
    text = {"class/text": np.arange(12, dtype=np.float32).reshape(3, 4)}
    path, out = tmp_path / "all.safetensors", tmp_path / "out.h5"
    info = store.TextInfo(prompts=("a {}.",), weights_sha256="d" * 64)
    changes = {"sampling.per_class": 7, "text": info}
    extract(path, images, dtype=dtype, with_head=True, more=text, changes=changes)
    manifest = converted(path, out, Conversion(class_only=class_only, drop_classes=dropped)).manifest
    assert manifest.text == info

    plain = extract(tmp_path / "plain.safetensors", kept_of(images, dropped), dtype=dtype, with_head=True)
    kept = [row for row, name in enumerate(("ant", "bee", "cat")) if name not in dropped]
    expected = read_all(plain) | {"class/text": text["class/text"][kept]}
    assert_same_bits(read_all(out), without(expected, *SAMPLES) if class_only else expected)
    with store.open_artifact(plain) as artifact:
        assert manifest.head == artifact.manifest.head
        assert manifest.classes == artifact.manifest.classes
        assert manifest.sampling.images_sha256 == artifact.manifest.sampling.images_sha256
        assert manifest.sampling.short_classes == ("cat" not in dropped)  # 6 images of 7
    with store.open_artifact(path) as artifact:
        of = artifact.manifest
        source = store.SourceInfo(manifest_sha256=of.sha256(), data_set=of.data_set, sampling=of.sampling)
        assert manifest.sources == (source,)


def test_dropping_again_keeps_the_first_source_and_says_that_the_head_is_new(tmp_path: Path) -> None:
    path = extract(tmp_path / "0.safetensors", draw_images(9, 0), with_head=True)
    one = converted(path, tmp_path / "1.safetensors", Conversion(drop_classes=("ant",)))
    two = converted(tmp_path / "1.safetensors", tmp_path / "2.safetensors", Conversion(drop_classes=("cat",)))
    assert two.manifest.classes == ("bee",)
    assert two.manifest.sources == one.manifest.sources
    assert one.notes == two.notes == ("The ridge head was fitted again, without the dropped classes.",)


def test_dropping_and_converting_go_together(path: Path) -> None:
    images = draw_images(20, 1)
    extract(path, images, dtype="float32")
    out = path.with_name("out.h5")
    loss = converted(path, out, Conversion("int8", drop_classes=("bee",), gzip=True)).loss
    plain = extract(path.with_name("plain.h5"), kept_of(images, ("bee",)), dtype="int8")
    assert_same_bits(read_all(out), read_all(plain))
    assert loss is not None
    assert loss.num_rows == 13


@pytest.mark.parametrize("has", ["no samples", "some samples", "no samples left"])
def test_a_head_that_cannot_be_fitted_again_is_dropped(path: Path, has: str) -> None:
    images = draw_images(9, 0)
    head = fit_head({"sample/embedding": images.embeddings, "sample/label": np.arange(9) % 3}, 3)
    some: Tensors = read_all(extract(path.with_name("ant.h5"), kept_of(images, ("bee", "cat"))))
    more = without(some, *(name for name in some if name.startswith("class/"))) if has != "no samples" else {}
    changes = {"sampling.images_sha256": None, "head": head.info()}
    extract(path, images, with_samples=False, changes=changes, more=head.tensors() | more)
    dropped = "ant" if has == "no samples left" else "cat"
    result = converted(path, path.with_name("out.h5"), Conversion(drop_classes=(dropped,)))
    assert result.notes == ("The ridge head was dropped: without the samples it cannot be fitted again.",)
    assert result.manifest.head is None
    assert result.manifest.sampling.images_sha256 is None
    assert ("sample/key" in result.manifest.tensors) == (has == "some samples")
    assert "head/weight" not in result.manifest.tensors


def test_an_artifact_is_converted_in_place(path: Path) -> None:
    tensors = int8_tensors()
    store.write_artifact(path, make_manifest(), tensors)
    assert refused(path, path, Conversion()) == (
        store.ArtifactWriteError,
        f"{path}: exists. Choose another --out, or pass --overwrite.",
    )
    before = path.stat().st_size
    result = converted(path, path, Conversion("float32"), overwrite=True)
    expected = without(tensors, "sample/scale") | {"sample/embedding": numbers_of(tensors)}
    assert_same_bits(read_all(path), expected)
    assert (result.bytes_before, result.bytes_after) == (before, path.stat().st_size)
    assert file_names(path.parent) == [path.name]


NO_SAMPLES = "{}: --dtype is of sample embeddings, and there would be none. Class statistics are always float32."
REFUSALS: dict[str, tuple[str, Conversion, str]] = {
    "a name that no class has": (
        "out.h5",
        Conversion(drop_classes=("class 1", "dog\x1b")),
        "{}: has no class 'dog\\x1b' to drop. `store inspect` shows its classes.",
    ),
    "all classes": (
        "out.h5",
        Conversion(drop_classes=("class 2", "class 1", "class 0")),
        "{}: all 3 classes would be dropped. Keep at least one.",
    ),
    "a type of no samples": ("out.h5", Conversion("int8", class_only=True), NO_SAMPLES),
    "gzip in safetensors": (
        "out.safetensors",
        Conversion(gzip=True),
        "{folder}/out.safetensors: .safetensors files are never compressed. Choose a name that ends in .h5.",
    ),
    "another suffix": (
        "out.pt",
        Conversion(),
        "{folder}/out.pt: an artifact's name ends in .safetensors, .h5, .hdf5, found '.pt'.",
    ),
    "no such folder": (
        "no/out.h5",
        Conversion(),
        "{folder}/no/out.h5: the folder {folder}/no does not exist. Make it first.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_made_is_refused(path: Path, name: str) -> None:
    out, conversion, message = REFUSALS[name]
    store.write_artifact(path, make_manifest(), all_tensors())
    assert refused(path, path.parent / out, conversion)[1] == message.format(path.name, folder=path.parent)


def test_a_type_of_samples_that_are_not_there_is_refused(path: Path) -> None:
    extract(path, draw_images(3, 0), with_samples=False)
    assert refused(path, path.with_name("out.h5"), Conversion("float32"))[1] == NO_SAMPLES.format(path.name)


@pytest.mark.parametrize("place", ["class", "sample"])
def test_a_damaged_input_is_refused_before_anything_is_written(
    path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = all_tensors()
    document = document_of(tensors)
    name = "class/m2" if place == "class" else "sample/embedding"
    document["tensors"][name]["sha256"] = "0" * 64
    save_foreign(path, document, tensors)
    old = path.with_name("old.h5")
    old.write_bytes(b"old")
    writes: list[Callable[..., object]] = []
    monkeypatch.setattr(convert, "write_artifact", writes.append)
    kind, message = refused(path, old, Conversion(), overwrite=True)
    assert kind is store.ArtifactDigestError
    assert message.startswith(f"{path.name}: {name} has SHA-256 ")
    assert writes == []


def test_progress_is_of_each_byte_that_is_checked_and_each_embedding_that_is_written(path: Path) -> None:
    tensors = all_tensors()
    store.write_artifact(path, make_manifest(), tensors)
    done: list[int] = []
    converted(path, path.with_name("out.h5"), Conversion("float32"), progress=done.append)
    assert sum(done) == sum(array.nbytes for array in tensors.values()) + 2 * tensors["sample/embedding"].nbytes
