import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from tests.store.examples import (
    SEARCH,
    Tensors,
    assert_same_bits,
    document_of,
    file_names,
    make_manifest,
    read_all,
    save_foreign,
)
from tests.store.test_merged_rows import Images, draw_images, extract, together
from tests.store.test_statistics import assert_merged

DTYPES = ("float32", "float16", "int8")
ROUNDED = ("class/mean", "class/m2")
TWO_PARTS = (draw_images(9, 0), draw_images(8, 1, ("dog", "bee")))
DATA_SET = make_manifest().data_set
HEAD_FITTED = "The ridge head was fitted again, to the samples of all inputs."
HEAD_DROPPED = "The ridge head was dropped: it cannot be merged from means, and not every input has its samples."
TEXT_DROPPED = "class/text was dropped: the inputs do not all have it, or differ in it."
OTHERS_ONLY = "The merged artifact has the samples of the other inputs only."


def class_only_note(*paths: Path) -> str:
    names = ", ".join(path.name for path in paths)
    return (
        f"{names}: class statistics only, which cannot prove that the inputs are disjoint. "
        "An image that stands in two of them is counted twice."
    )


def merged(out: Path, *paths: Path, **options: Any) -> store.MergeResult:
    """Merge, and verify what was made."""
    result = store.merge_artifacts(paths, out, **options)
    assert store.verify_artifact(out) == result.manifest.sha256()
    return result


def extract_all(folder: Path, parts: Sequence[Images], *changes: dict[str, Any], **options: Any) -> list[Path]:
    """Extract each part, with the changes of its manifest, into 0.safetensors, 1.safetensors and so on."""
    pairs = zip_longest(parts, changes)
    return [
        extract(folder / f"{index}.safetensors", part, changes=change, **options)
        for index, (part, change) in enumerate(pairs)
    ]


def refused(*paths: Path, **options: Any) -> str:
    """Return why artifacts are not merged; nothing may have been written."""
    before = file_names(paths[0].parent)
    with pytest.raises(store.StoreError) as caught:
        store.merge_artifacts(paths, paths[0].with_name("out.h5"), **options)
    assert type(caught.value) is store.ArtifactMergeError
    assert file_names(paths[0].parent) == before
    return str(caught.value)


def assert_is_one_extraction(found: Path, expected: Path, parts: Sequence[Images]) -> None:
    """Compare a merge with one extraction of the union: to the bit, and means and M2 within their bound."""
    one, other = read_all(found), read_all(expected)
    assert_same_bits(*({name: a for name, a in each.items() if name not in ROUNDED} for each in (one, other)))
    with store.open_artifact(found) as artifact, store.open_artifact(expected) as whole:
        manifest = artifact.manifest
        assert manifest.classes == whole.manifest.classes
        assert manifest.sampling.images_sha256 == whole.manifest.sampling.images_sha256
        assert manifest.head == whole.manifest.head
    for row, name in enumerate(manifest.classes):
        having = [part.embeddings[np.array(part.names) == name, 0] for part in parts if name in part.names]
        of_class, expected_of_class = (
            {key: each[key][row] for key in ("class/count", *ROUNDED)} for each in (one, other)
        )
        assert_merged(of_class, expected_of_class, having)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_one_extraction_of_all_images(path: Path, dtype: str, views: int) -> None:
    parts = [draw_images(11, 0, views=views), draw_images(8, 1, ("dog", "bee"), views), draw_images(2, 2, views=views)]
    parts[1].keys[0] = parts[0].keys[1]  # an image under two labels is no overlap
    paths = extract_all(path.parent, parts, dtype=dtype, with_head=True)
    result = merged(path, *paths)
    whole = extract(path.with_name("whole.safetensors"), together(*parts), dtype=dtype, with_head=True)
    assert_is_one_extraction(path, whole, parts)
    assert result.manifest.classes == ("ant", "bee", "cat", "dog")
    assert (result.num_shared, result.notes) == (0, (HEAD_FITTED,))


@settings(SEARCH, max_examples=25)
@given(data=st.data(), num_images=st.integers(4, 30), offset=st.floats(-1e4, 1e4), dtype=st.sampled_from(DTYPES))
def test_any_division_of_the_images_merges_to_the_same(
    data: st.DataObject, num_images: int, offset: float, dtype: str
) -> None:
    images = draw_images(num_images, data.draw(st.integers(0, 99)), ("ant", "bee", "cat", "dog"))
    images.embeddings[...] += np.float32(offset)
    of_part = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images)))
    of_part[:2] = 0, 1  # two parts or more
    names = np.array(images.names)
    parts = [
        Images(images.keys[of_part == part], names[of_part == part].tolist(), images.embeddings[of_part == part])
        for part in data.draw(st.permutations(np.unique(of_part).tolist()))
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.safetensors")
        merged(out, *extract_all(Path(folder), parts, dtype=dtype))
        assert_is_one_extraction(out, extract(Path(folder, "all.safetensors"), together(*parts), dtype=dtype), parts)


def samples_by_name(path: Path) -> dict[tuple[bytes, str], bytes]:
    tensors = read_all(path)
    with store.open_artifact(path) as artifact:
        names = [artifact.manifest.classes[label] for label in tensors["sample/label"]]
    rows = zip(tensors["sample/key"], names, tensors["sample/embedding"], strict=True)
    return {(key.tobytes(), name): embedding.tobytes() for key, name, embedding in rows}


def test_shared_images_are_refused_or_stored_once_and_counted_twice(tmp_path: Path) -> None:
    parts = one, two = draw_images(9, 0), draw_images(6, 1)
    two.keys[:4] = one.keys[[0, 1, 2, 4]]  # the last under another label
    paths, out = extract_all(tmp_path, parts), tmp_path / "out.safetensors"
    assert refused(*paths) == (
        "0.safetensors, 1.safetensors: of their samples 3 are repeated, same image and same label, and would be "
        "counted twice. Extract disjoint parts, or pass --allow-overlap to store each once and count both."
    )
    assert merged(out, *paths, allow_overlap=True).num_shared == 3
    assert_is_one_extraction(out, extract(tmp_path / "all.safetensors", together(*parts)), parts)
    assert read_all(out)["class/count"].tolist() == [5, 5, 5]
    first, second = map(samples_by_name, paths)
    assert samples_by_name(out) == second | first
    merged(out, *reversed(paths), allow_overlap=True, overwrite=True)
    assert samples_by_name(out) == first | second


def test_the_order_of_inputs_decides_nothing_but_that_of_the_classes(tmp_path: Path) -> None:
    paths, out = extract_all(tmp_path, TWO_PARTS), tmp_path / "out.safetensors"
    assert merged(out, *paths).manifest.classes == ("ant", "bee", "cat", "dog")
    samples = samples_by_name(out)
    assert merged(out, *reversed(paths), overwrite=True).manifest.classes == ("dog", "bee", "ant", "cat")
    assert samples_by_name(out) == samples


def test_equal_weights_may_go_by_several_names_and_one_view_needs_no_seed(tmp_path: Path) -> None:
    names = {"teacher.name": "folder", "teacher.revision": "c" * 40, "teacher.licence": "mit"}
    paths = extract_all(tmp_path, TWO_PARTS, {}, names | {"data_set.name": "owner/others", "sampling.seed": 7})
    manifest = merged(tmp_path / "out.safetensors", *paths).manifest
    assert (manifest.teacher, manifest.sampling.seed) == (make_manifest().teacher, 0)


def test_class_statistics_alone_are_merged_with_a_note(tmp_path: Path) -> None:
    paths, out = extract_all(tmp_path, TWO_PARTS, with_samples=False), tmp_path / "out.safetensors"
    result = merged(out, *paths)
    assert (result.num_shared, result.notes) == (0, (class_only_note(*paths),))
    unknown = {"sampling.images_sha256": None}
    whole = extract(tmp_path / "all.safetensors", together(*TWO_PARTS), with_samples=False, changes=unknown)
    assert_is_one_extraction(out, whole, TWO_PARTS)


@pytest.mark.parametrize("without", [0, 1])
def test_samples_of_some_inputs_are_kept(tmp_path: Path, without: int) -> None:
    paths = extract_all(tmp_path, TWO_PARTS, with_head=True)
    store.convert_artifact(paths[without], paths[without], store.Conversion(class_only=True), overwrite=True)
    result = merged(tmp_path / "out.safetensors", *paths)
    assert result.notes == (class_only_note(paths[without]), OTHERS_ONLY, HEAD_DROPPED)
    assert (result.manifest.head, result.manifest.sampling.images_sha256) == (None, None)
    assert samples_by_name(tmp_path / "out.safetensors") == samples_by_name(paths[1 - without])
    # Samples, but not of all images: what is merged with them has no head either.
    third = extract(tmp_path / "third.safetensors", draw_images(3, 2), with_head=True)
    result = merged(tmp_path / "again.safetensors", tmp_path / "out.safetensors", third)
    assert (result.notes, result.manifest.sampling.images_sha256) == ((HEAD_DROPPED,), None)


@pytest.mark.parametrize("with_samples", [False, True])
def test_exactly_the_same_images_are_refused_without_their_samples(tmp_path: Path, with_samples: bool) -> None:
    one = extract(tmp_path / "a.safetensors", draw_images(9, 0), with_samples=with_samples)
    two = extract(tmp_path / "b.safetensors", draw_images(9, 0), with_samples=False)
    assert refused(one, two) == (
        "b.safetensors: is of exactly the images of a.safetensors. Leave it out, or pass --allow-overlap to count "
        "them twice."
    )
    merged(tmp_path / "out.safetensors", one, two, allow_overlap=True)
    assert read_all(tmp_path / "out.safetensors")["class/count"].tolist() == [6, 6, 6]


def test_the_same_images_under_other_labels_are_no_overlap(tmp_path: Path) -> None:
    coarse = draw_images(9, 0)._replace(names=["pet", "insect", "pet"] * 3)
    paths = extract_all(tmp_path, [coarse, coarse._replace(names=["cat", "ant", "cat"] * 3)], with_samples=False)
    assert merged(tmp_path / "out.safetensors", *paths).manifest.classes == ("pet", "insect", "cat", "ant")


def test_merges_are_merged_as_if_all_were_merged_at_once(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"data_set.rows": 100, "software": {"torch": "2.11"}},
        {"data_set.rows": 40, "data_set.name": "owner/others", "software": {"torch": "2.12"}},
        {"data_set.rows": 100, "software": {"torch": "2.11", "numpy": "2.4"}},
    ]
    paths = extract_all(tmp_path, [draw_images(6, seed, views=2) for seed in range(3)], *changes, with_head=True)
    flat, inner, nested = (tmp_path / f"{name}.safetensors" for name in ("flat", "inner", "nested"))
    manifest = merged(flat, *paths).manifest
    merged(inner, *paths[:2])
    assert merged(nested, inner, paths[2]).manifest.model_copy(update={"tensors": manifest.tensors}) == manifest
    ones, others = read_all(flat), read_all(nested)
    assert_same_bits(*({name: a for name, a in each.items() if name not in ROUNDED} for each in (ones, others)))

    assert (manifest.data_set.name, manifest.data_set.rows) == ("owner/images + owner/others", 140)
    assert manifest.software == {"torch": "2.11 + 2.12", "numpy": "2.4"}
    for source, path in zip(manifest.sources, paths, strict=True):
        with store.open_artifact(path) as artifact:
            of = artifact.manifest
            assert (source.manifest_sha256, source.data_set, source.sampling) == (of.sha256(), of.data_set, of.sampling)


def test_the_manifest_says_what_was_asked_for_and_found(tmp_path: Path) -> None:
    split = {"data_set.split": "test", "data_set.config": "small", "data_set.licence": "mit"}
    changes: list[dict[str, Any]] = [
        {"sampling.per_class": 3, "sampling.batch_size": 6, "sampling.limit": 50, "sampling.skipped_images": 2},
        {"sampling.per_class": 5, "sampling.batch_size": 8, "sampling.limit": 50, "sampling.skipped_images": 1} | split,
        {"sampling.limit": 7},
    ]
    parts = [draw_images(9, 0), draw_images(8, 1), draw_images(3, 2)]  # 3, 3, 3; 3, 3, 2; 1, 1, 1 images
    paths, out = extract_all(tmp_path, parts, *changes), tmp_path / "out.safetensors"
    manifest = merged(out, *paths[:2]).manifest
    sampling = manifest.sampling
    assert (sampling.per_class, sampling.short_classes, sampling.limit) == (8, 3, 50)
    assert (sampling.batch_size, sampling.skipped_images, sampling.seed) == (8, 3, 0)
    joined = {"split": "train + test", "config": "small", "licence": "mit", "rows": 20}
    assert manifest.data_set == DATA_SET.model_copy(update=joined)
    sampling = merged(out, *paths, overwrite=True).manifest.sampling
    assert (sampling.per_class, sampling.short_classes, sampling.limit) == (None, 0, None)


@pytest.mark.parametrize("others", ["equal", "missing", "different", "other prompts", "no record"])
def test_text_embeddings_are_kept_with_their_record_where_all_agree(tmp_path: Path, others: str) -> None:
    text = np.arange(16, dtype=np.float32).reshape(4, 4)  # of ant, bee, cat, dog
    other = {"missing": {}, "different": {"class/text": text[[3, 2]]}}.get(others, {"class/text": text[[3, 1]]})
    more = [{"class/text": text[:3]}, other, {"class/text": text[:3]}]
    info = store.TextInfo(prompts=("a {}.",), weights_sha256="d" * 64)
    records = [
        info,
        {"other prompts": info.model_copy(update={"prompts": ("{}",)}), "no record": None}.get(others, info),
    ]
    parts = zip((*TWO_PARTS, draw_images(3, 2)), more, (*records, info), strict=True)
    paths = [
        extract(tmp_path / f"{index}.safetensors", part, more=mine, changes={"text": record})
        for index, (part, mine, record) in enumerate(parts)
    ]
    result = merged(tmp_path / "out.safetensors", *paths)
    assert result.notes == (() if others == "equal" else (TEXT_DROPPED,))
    assert result.manifest.text == (info if others == "equal" else None)
    found = {name: array for name, array in read_all(tmp_path / "out.safetensors").items() if name == "class/text"}
    assert_same_bits(found, {"class/text": text} if others == "equal" else {})


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_text_embeddings_as_far_apart_as_can_be_differ_without_a_warning(tmp_path: Path) -> None:
    largest = np.finfo(np.float32).max
    paths = [
        extract(
            tmp_path / f"{index}.h5", draw_images(6, index), more={"class/text": np.full((3, 4), value, np.float32)}
        )
        for index, value in enumerate((largest, -largest))
    ]
    assert merged(tmp_path / "out.h5", *paths).notes == (TEXT_DROPPED,)


def test_unknown_tensors_are_dropped_with_a_note(tmp_path: Path) -> None:
    one, two = draw_images(9, 0), draw_images(9, 1)
    more: Tensors = {"future/x": np.ones(3, np.int8), "sample/mood": np.ones(9, np.float32)}
    paths = [
        extract(tmp_path / "a.safetensors", one, more=more),
        extract(tmp_path / "b.safetensors", two, more={"a/x": more["future/x"]}),
    ]
    note = "Not kept, since this program does not know how to merge them: a/x, future/x, sample/mood."
    assert merged(tmp_path / "out.safetensors", *paths).notes == (note,)


def test_a_strangers_manifest_is_no_crash(tmp_path: Path) -> None:
    one, two = extract_all(tmp_path, [draw_images(9, seed) for seed in (0, 1)], {}, {"sampling.per_class": 1})
    tensors = {name: array for name, array in read_all(one).items() if name.startswith("class/")}
    document = document_of(tensors)
    document["sampling"] |= {"views": 1, "per_class": 2**63 - 1}
    document["data_set"]["future"] = ["a list"]
    save_foreign(one, document, tensors)
    manifest = merged(tmp_path / "out.safetensors", one, two).manifest
    assert (manifest.sampling.per_class, manifest.sampling.short_classes) == (2**63 - 1, 6)
    assert manifest.data_set.model_extra == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling.per_class": 2**62}, "per_class"),
        ({"sampling.skipped_images": 2**62}, "skipped_images"),
        ({"data_set.rows": 2**62}, "rows"),
    ],
)
def test_sums_that_no_artifact_can_hold_are_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    names = [change, change | {"data_set.name": "owner/others"}]
    paths = extract_all(tmp_path, [draw_images(9, seed) for seed in (0, 1)], *names)
    assert refused(*paths) == (
        f"0.safetensors, 1.safetensors: {field} of all together would be {2**63}, at most {2**63 - 1} can be stored."
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_means_too_far_apart_for_their_m2_are_refused_without_a_warning(tmp_path: Path) -> None:
    paths = extract_all(tmp_path, [draw_images(9, seed) for seed in (0, 1)], with_samples=False)
    largest = np.finfo(np.float32).max
    for path, value in zip(paths, (largest, -largest), strict=True):
        means = {"class/mean": np.full((3, 4), value, np.float32)}
        store.write_artifact(path, make_manifest(), read_all(path) | means, overwrite=True)
    assert refused(*paths) == (
        "0.safetensors, 1.safetensors: class/m2 of all together would be 6.948e+77, at most 3.403e+38 can be stored."
    )


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        (
            {"class/count": np.full(3, 2**63 - 1)},
            "class/count has a value of 9223372036854775807, expected at most 9007199254740992.",
        ),
        (
            {"sample/scale": np.full((9, 1), 2.0**121, np.float32)},  # 128 such steps are infinity
            f"sample/scale has a value of {2.0**121}, expected at most {float(np.finfo(np.float32).max) / 128}.",
        ),
    ],
)
def test_numbers_that_would_overflow_are_refused(tmp_path: Path, strange: Tensors, message: str) -> None:
    one, two = extract_all(tmp_path, [draw_images(9, seed) for seed in (0, 1)], dtype="int8", with_head=True)
    tensors = read_all(two) | strange
    store.write_artifact(two, make_manifest(views=1), tensors, overwrite=True)
    with pytest.raises(store.ArtifactFormatError) as caught:
        store.merge_artifacts([one, two], tmp_path / "out.safetensors", allow_overlap=True)
    assert str(caught.value) == f"1.safetensors: {message} The file is damaged: extract it again."


def test_a_damaged_input_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    one, two = extract_all(tmp_path, [draw_images(9, seed) for seed in (0, 1)])
    tensors = read_all(two)
    document = document_of(tensors)
    document["sampling"]["views"] = 1
    document["tensors"]["sample/embedding"]["sha256"] = "0" * 64
    save_foreign(two, document, tensors)
    before = one.read_bytes()
    with pytest.raises(store.ArtifactDigestError, match=r"^1\.safetensors: sample/embedding has SHA-256 "):
        store.merge_artifacts([one, two], one, overwrite=True)
    assert one.read_bytes() == before
    assert file_names(tmp_path) == [one.name, two.name]


def test_one_artifact_is_no_merge_and_the_output_is_looked_at_first(tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    for count in (0, 1):
        with pytest.raises(store.ArtifactMergeError) as caught:
            store.merge_artifacts([tmp_path / "nowhere.h5"] * count, out)
        assert str(caught.value) == f"{out}: a merge needs two artifacts or more, found {count}."
    out.write_bytes(b"old")
    with pytest.raises(store.ArtifactWriteError) as written:
        store.merge_artifacts([tmp_path / "nowhere.h5"] * 2, out)
    assert str(written.value) == f"{out}: exists. Choose another --out, or pass --overwrite."


def test_a_merge_may_replace_an_input_and_reports_its_progress(tmp_path: Path) -> None:
    one, two = extract_all(tmp_path, TWO_PARTS)
    read = sum(array.nbytes for path in (one, two) for array in read_all(path).values())
    done: list[int] = []
    merged(one, one, two, overwrite=True, progress=done.append)
    assert_is_one_extraction(one, extract(tmp_path / "all.h5", together(*TWO_PARTS)), TWO_PARTS)
    assert sum(done) == read + sum(array.nbytes for name, array in read_all(one).items() if "sample" in name)
