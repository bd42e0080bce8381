"""An artifact is checked against a teacher and data: what matches, what differs and why, and what cannot be checked."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pydantic import ValidationError

import store
from pipeline.data import BadImageError, DataSettings, Labelled
from pipeline.errors import PipelineError
from pipeline.extract import CheckResult, CheckSettings, ExtractSettings, check_artifact, extract
from pipeline.extract.teacher import Teacher
from pipeline.pixels import sample_key
from pipeline.views import VIEWS_VERSION
from store import Conversion
from tests.conftest import CLASS_NAMES, make_images, make_split

SUFFIXES = (".safetensors", ".h5")

Check = Callable[..., CheckResult]
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.run.write_report_card", lambda *arguments: None)


@pytest.fixture
def make(tiny_teacher: Path, saved_data: Path, tmp_path: Path) -> Make:
    """Extract an artifact from the tiny teacher and data."""

    def make_artifact(name: str = "a.safetensors", **options: Any) -> Path:
        given: dict[str, Any] = {"teacher": str(tiny_teacher), "data": data_of(saved_data), "out": tmp_path / name}
        given |= {"device": "cpu", "precision": "float32", "batch_size": 8, "samples": True}
        return extract(ExtractSettings(**(given | options))).path

    return make_artifact


@pytest.fixture
def check(tiny_teacher: Path, saved_data: Path) -> Check:
    def check_one(path: Path, **options: Any) -> CheckResult:
        given: dict[str, Any] = {"teacher": str(tiny_teacher), "data": data_of(saved_data), "fraction": 1.0}
        return check_artifact(CheckSettings(artifact=path, **(given | {"device": "cpu"} | options)))

    return check_one


def data_of(folder: Path, **options: Any) -> DataSettings:
    return DataSettings(dataset=str(folder), **options)


def save(rows: datasets.Dataset, folder: Path) -> DataSettings:
    datasets.DatasetDict(train=rows).save_to_disk(str(folder))
    return data_of(folder)


def training_rows(saved_data: Path) -> datasets.Dataset:
    return datasets.load_from_disk(str(saved_data))["train"]


def changed_teacher(teacher: Path, folder: Path, **changes: Any) -> Path:
    """Copy a teacher, with other settings of its image processor."""
    transformers.ViTForImageClassification.from_pretrained(teacher).save_pretrained(folder)
    settings = json.loads((teacher / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    return folder


def refusal(check: Check, path: Path, **options: Any) -> str:
    with pytest.raises(PipelineError) as error:
        check(path, **options)
    return str(error.value)


def rewrite(path: Path, manifest_changes: dict[str, Any] | None = None, **tensor_changes: Any) -> Path:
    """Write an artifact anew, with another manifest or other tensors; its digests are right."""
    with store.open_artifact(path) as artifact:
        manifest = artifact.manifest
        tensors = {name: np.array(artifact[name]) for name in manifest.tensors}
    tensors |= {name.replace("_", "/"): tensor for name, tensor in tensor_changes.items()}
    manifest = manifest.model_copy(update=manifest_changes or {})
    store.write_artifact(path, manifest, tensors, overwrite=True)
    return path


def row_texts(result: CheckResult, label: str) -> list[str]:
    return [text for name, text in result.rows() if name == label]


# What matches


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_extracted_here_matches(make: Make, check: Check, suffix: str, dtype: str) -> None:
    result = check(make(f"a{suffix}", dtype=dtype, views=2, view_size=16))
    assert result.matches
    assert result.verdict() == "matches: 30 of 30 samples"
    assert row_texts(result, "compared") == ["30 of 30 samples × 2 views, in float32 on cpu"]
    numbers = result.as_json()
    assert numbers["matches"] is True
    assert (numbers["num_compared"], numbers["num_views"], numbers["num_read"]) == (30, 2, 30)
    assert (numbers["num_absent"], numbers["num_differing"], numbers["failures"]) == (0, 0, ())
    assert numbers["worst_relative_error"] < (1e-5 if dtype == "float32" else 5e-4)
    assert numbers["mean_cosine"] > 0.999999


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_converted_artifact_matches_within_the_rounding_of_its_type(make: Make, check: Check, dtype: str) -> None:
    path = make()
    converted = path.with_name("converted.h5")
    store.convert_artifact(path, converted, Conversion(dtype=dtype))
    result = check(converted)
    assert result.matches
    worst = result.as_json()["worst_relative_error"]
    assert 0 < worst < (0.02 if dtype == "int8" else 5e-4)


def test_the_rounding_that_int8_excuses_is_no_more_than_half_a_step(make: Make, check: Check) -> None:
    path = make()
    store.convert_artifact(path, path, Conversion(dtype="int8"), overwrite=True)
    with store.open_artifact(path) as artifact:
        steps = np.array(artifact["sample/embedding"])
    steps[4] = np.where(steps[4] > 0, steps[4] - 2, steps[4] + 2)
    assert check(rewrite(path, sample_embedding=steps)).as_json()["num_differing"] == 1


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (0.01, 1), (0.1, 3), (0.11, 4), (1.0, 30)])
def test_a_fraction_is_rounded_up(make: Make, check: Check, fraction: float, expected: int) -> None:
    path = make()
    numbers = check(path, fraction=fraction).as_json()
    assert (numbers["num_chosen"], numbers["num_compared"]) == (expected, expected)
    assert numbers["num_read"] == max(16, expected)
    assert check(path, fraction=fraction).as_json()["worst"] == numbers["worst"]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_other_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValidationError, match="fraction"):
        CheckSettings(artifact=Path("a.h5"), teacher="t", data=DataSettings(dataset="d"), fraction=fraction)


def test_a_limit_of_ones_own_is_refused() -> None:
    with pytest.raises(ValidationError, match="a limit is the manifest's to say"):
        CheckSettings(artifact=Path("a.h5"), teacher="t", data=DataSettings(dataset="d", limit=3))


def test_split_columns_and_limit_are_the_manifests(make: Make, check: Check, tmp_path: Path) -> None:
    rows = make_split(12, 3).rename_column("image", "picture")
    rows = rows.add_column("other", rows["label"], feature=rows.features["label"])
    datasets.DatasetDict(dev=rows, train=make_split(6, 9)).save_to_disk(str(tmp_path / "columns"))
    data = data_of(tmp_path / "columns", split="dev", label_column="other", limit=9)
    for options in ({}, {"samples": False, "per_class": "all"}):
        path = make("b.h5", data=data, overwrite=True, **options)
        assert check(path, data=data_of(tmp_path / "columns")).matches
    assert refusal(check, path, data=data_of(tmp_path / "columns", label_column="kind")) == (
        f"{tmp_path / 'columns'}: no column 'kind'. Candidates for --label-column: label, other."
    )


def test_classes_are_drawn_as_the_extraction_drew_them(make: Make, check: Check) -> None:
    path = make(samples=False, per_class=4, seed=7)
    result = check(path)
    assert result.verdict() == "matches: 3 of 3 classes"
    assert result.as_json()["worst_relative_error"] < 1e-6
    assert check(path, fraction=0.34).as_json()["num_compared"] == 2
    assert check(path, fraction=0.01).as_json()["num_compared"] == 1
    unlimited = make("all.h5", samples=False, per_class="all")
    assert check(unlimited).matches


def test_another_precision_is_said_and_given_more_room(make: Make, check: Check) -> None:
    path = make()
    result = check(path, precision="bfloat16")
    assert result.matches
    assert row_texts(result, "compared") == [
        "30 of 30 samples, in bfloat16 on cpu; the file's are in float32, so more may differ"
    ]
    assert result.tolerance == 0.5
    assert result.as_json()["worst_relative_error"] > 1e-3


def test_bfloat16_is_used_again_where_the_hardware_has_it(
    make: Make, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(precision="bfloat16")
    for has, precision, tolerance in ((True, "bfloat16", 0.1), (False, "float32", 0.5)):
        monkeypatch.setattr("pipeline.runtime._has_bfloat16", lambda device, has=has: has)
        result = check(path)
        assert (result.matches, result.precision, result.tolerance) == (True, precision, tolerance)


# Data that is not quite the same


def test_shuffled_data_matches(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    shuffled = save(training_rows(saved_data).shuffle(seed=1), tmp_path / "shuffled")
    result = check(make(per_class=4), data=shuffled)
    assert result.verdict() == "matches: 12 of 12 samples"
    numbers = result.as_json()
    assert 0 < numbers["num_absent"] <= 18
    (note,) = result.as_json()["notes"]
    assert f"{numbers['num_absent']} of {numbers['num_read']} images read are not in the file (row " in note
    assert note.endswith("), which holds a choice of its data")


def test_a_subset_matches_as_far_as_it_goes(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    few = save(training_rows(saved_data).select([4, 0, 9]), tmp_path / "few")
    result = check(make(), data=few)
    assert result.verdict() == "matches: 3 of 30 samples"
    assert result.as_json()["notes"] == ("only 3 of 30 samples are among the 3 images read",)


def test_reading_stops_where_nothing_more_is_found(
    make: Make, check: Check, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.extract.search.MIN_FRUITLESS_ROWS", 32)
    monkeypatch.setattr("pipeline.extract.search._FRUITLESS_GAPS", 1)
    other = save(make_split(3000, 5), tmp_path / "other")
    message = refusal(check, make(), data=other, fraction=0.1)
    assert message.startswith("a.safetensors: none of its samples is among 112 images of ")


def test_data_that_shares_nothing_is_an_error_with_examples(
    make: Make, check: Check, saved_data: Path, tmp_path: Path
) -> None:
    path, other = make(), save(make_split(2, 5), tmp_path / "other")
    keys = [sample_key(image).hex()[:12] for image in make_images(2, 5)]
    start, end = (
        f"a.safetensors: none of its samples is among 2 images of {tmp_path / 'other'}, split train (",
        "). It was made of saved, split train: pass that data, with the same labels.",
    )
    examples = [f"row {row}: {CLASS_NAMES[row]}, key {keys[row]}…" for row in range(2)]
    assert refusal(check, path, data=other) in [f"{start}{'; '.join(each)}{end}" for each in (examples, examples[::-1])]


def test_data_without_a_class_of_the_artifact_is_an_error(make: Make, check: Check, tmp_path: Path) -> None:
    other = save(make_split(4, 0, ("dog", "emu")), tmp_path / "other")
    assert refusal(check, make(), data=other) == (
        "a.safetensors: has none of the data's 2 classes (dog, emu). It has 3, among them ant, bee, cat. Is it the "
        "artifact of this data set? Check --dataset and --label-column."
    )


def test_changed_labels_are_named(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    rows = training_rows(saved_data)
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bee", "cat", "ant"])})
    turned = save(datasets.Dataset.from_dict(rows[:], features=names), tmp_path / "turned")
    message = refusal(check, make(), data=turned)
    assert "split train; 30 are in it under another label (row " in message
    assert message.endswith("in the file). It was made of saved, split train: pass that data, with the same labels.")
    labels = [1, *rows["label"][1:]]
    one = save(rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"]), tmp_path / "1")
    result = check(make("b.h5"), data=one)
    assert result.matches
    assert result.as_json()["notes"] == (
        "only 29 of 30 samples are among the 30 images read",
        "1 of 30 images read have another label in the file (row 0: bee in the data, ant in the file)",
    )


def test_changed_pixels_are_counted(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    rows = training_rows(saved_data)[:]
    rows["image"] = [*rows["image"][:-1], Image.new("RGB", (8, 8), "red")]
    changed = save(datasets.Dataset.from_dict(rows, features=training_rows(saved_data).features), tmp_path / "changed")
    key = sample_key(Image.new("RGB", (8, 8), "red")).hex()[:12]
    result = check(make(), data=changed)
    assert result.verdict() == "matches: 29 of 30 samples"
    assert result.as_json()["notes"][1] == (
        f"1 of 30 images read are not in the file (row 29: cat, key {key}…), which holds all of its data: other pixels?"
    )


def test_images_that_cannot_be_decoded_are_counted(make: Make, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    fail_to_decode(monkeypatch, lambda row, times: row in (3, 4))
    result = check(path)
    assert result.verdict() == "matches: 28 of 30 samples"
    assert "2 of 30 images read cannot be decoded" in result.as_json()["notes"]
    fail_to_decode(monkeypatch, lambda row, times: True)
    assert "images of " in refusal(check, path)
    assert refusal(check, path).endswith(
        ", split train; 30 cannot be decoded. It was made of saved, split train: pass that data, with the same labels."
    )


def test_a_limit_may_leave_nothing_that_the_artifact_has(make: Make, check: Check, tmp_path: Path) -> None:
    path = make()
    with store.open_artifact(path) as artifact:
        sampling = artifact.manifest.sampling.model_copy(update={"limit": 1})
    data = save(make_split(12, 0, ("dog", "ant")), tmp_path / "dogs")
    result = check(rewrite(path, {"sampling": sampling}), data=data)
    assert result.as_json()["num_compared"] == 2  # images 3 and 9
    assert result.as_json()["num_read"] == 6  # a dog is not looked at


def fail_to_decode(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int], bool]) -> None:
    """Let images fail by their row and how often they were read before."""
    read, times = Labelled.read, dict.fromkeys(range(1000), 0)

    def read_or_fail(self: Labelled, indices: list[int]) -> list[Any]:
        images = list(read(self, indices))
        for place, row in enumerate(indices):
            images[place] = BadImageError("no") if fails(row, times[row]) else images[place]
            times[row] += 1
        return images

    monkeypatch.setattr(Labelled, "read", read_or_fail)


def test_an_image_that_is_another_at_the_second_reading_is_named(
    make: Make, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    with monkeypatch.context() as context:
        fail_to_decode(context, lambda row, times: row == 7 and times == 1)
        result = check(path)
    assert not result.matches
    assert result.as_json()["failures"] == ("1 images could not be decoded when they were read again (row 7)",)
    seen: dict[int, int] = {}
    decode = Labelled._decode

    def decode_otherwise(self: Labelled, row: int, cell: Any) -> Any:
        seen[row] = seen.get(row, 0) + 1
        return Image.new("RGB", (8, 8)) if row in changing and seen[row] == 2 else decode(self, row, cell)

    monkeypatch.setattr(Labelled, "_decode", decode_otherwise)
    changing = {5}
    result = check(path)
    assert result.as_json()["failures"] == ("1 images had other pixels when they were read again (row 5)",)
    assert result.as_json()["num_compared"] == 29
    seen.clear()
    changing = set(range(30))
    assert refusal(check, path).endswith(
        ": 30 images had other pixels when they were read again (row 0, 1, 2, 3, 4, …). Nothing could be compared."
    )


# Another teacher


def test_other_weights_fail_before_anything_is_embedded(
    make: Make, check: Check, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = make(), changed_teacher(tiny_teacher, tmp_path / "other")
    model = transformers.ViTForImageClassification.from_pretrained(other)
    with torch.no_grad():
        model.vit.layernorm.bias[3] += 1e-3
    model.save_pretrained(other)
    monkeypatch.setattr("pipeline.extract.again.find_samples", None)
    result = check(path, teacher=str(other))
    assert (result.matches, result.compared) == (False, None)
    (line,) = result.facts.lines
    assert line.startswith("teacher weights differ: the file says ")
    assert result.verdict() == f"{line}. Nothing was embedded: pass the teacher that made it, tiny-vit."
    assert result.rows() == [("artifact", str(path)), ("differs", line), ("result", "FAILED")]
    assert result.as_json()["teacher_differences"] == (line,)
    assert "num_compared" not in result.as_json()


def test_a_teacher_that_cannot_be_pooled_so_is_another_one(make: Make, check: Check, tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    result = check(make(), teacher=str(tmp_path / "resnet"))
    assert [line.split(":")[0] for line in result.facts.lines[:3]] == [
        "teacher weights differ",
        "embeddings differ in length",
        "teacher architecture differs",
    ]


def test_a_pooling_that_fails_otherwise_keeps_its_reason(
    make: Make, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    manifest = store.open_artifact(path).manifest
    pooled = manifest.teacher.model_copy(update={"pooling": "pooled"})
    assert refusal(check, rewrite(path, {"teacher": pooled})).endswith(
        ": the checkpoint has no weights for the pooler. Pass --pooling cls or mean."
    )


def test_other_preprocessing_is_said_and_its_embeddings_fail(
    make: Make, check: Check, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = changed_teacher(tiny_teacher, tmp_path / "other", image_mean=[0.4, 0.5, 0.5])
    result = check(make(), teacher=str(other))
    assert row_texts(result, "differs") == [
        "preprocessing image_mean differs: the file says [0.5, 0.5, 0.5], this teacher has [0.4, 0.5, 0.5]"
    ]
    assert result.verdict() == (
        "30 of 30 samples differ from the file's. Likely cause: other preprocessing (image_mean)."
    )
    assert row_texts(result, "result") == ["FAILED"]
    worst = row_texts(result, "worst")
    assert len(worst) == 3
    assert all(name.startswith("row ") and ", key " in name for name in worst)


def test_preprocessing_that_is_only_spelt_otherwise_matches(
    make: Make, check: Check, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = changed_teacher(tiny_teacher, tmp_path / "other", **{f"unused_{index}": index for index in range(10)})
    result = check(make(), teacher=str(other))
    assert result.matches
    assert len(result.facts.preprocessing) == 10
    assert result.facts.lines[0] == ("preprocessing unused_0 differs: the file says null, this teacher has 0")
    assert result.facts.lines[-1] == "preprocessing differs in 2 more settings"


# What the file says is not what the teacher gives


def test_samples_that_were_changed_are_named_with_the_view(make: Make, check: Check) -> None:
    path = make(views=2, view_size=16, dtype="float32")
    with store.open_artifact(path) as artifact:
        embeddings, key = np.array(artifact["sample/embedding"]), artifact["sample/key"][11].tobytes()
    embeddings[11, 1] *= 1.01
    result = check(rewrite(path, sample_embedding=embeddings))
    assert result.verdict() == (
        "1 of 30 samples differ from the file's. Likely cause: none that the manifest shows: weights, preprocessing "
        "and versions are the file's; its numbers may have been changed, or stored as int8 before."
    )
    row = next(row for row, image in enumerate(make_images(30, 0)) if sample_key(image) == key)
    assert row_texts(result, "worst")[0] == f"row {row}, {CLASS_NAMES[row % 3]}, key {key.hex()[:12]}…, view 1: 0.0099"


def test_other_versions_are_named_as_a_cause(make: Make, check: Check) -> None:
    path = make(dtype="float32")
    with store.open_artifact(path) as artifact:
        manifest, embeddings = artifact.manifest, np.array(artifact["sample/embedding"])
    software = manifest.software | {"torch": "1.0", "cosmology": "7"}
    result = check(rewrite(path, {"software": software}, sample_embedding=-embeddings))
    versions = f"torch 1.0 there, {manifest.software['torch']} here"
    assert result.as_json()["software_differences"] == (versions,)
    assert result.verdict().endswith(f" Likely cause: other versions ({versions}).")
    assert result.as_json()["mean_cosine"] == pytest.approx(-1)


def test_a_zero_embedding_in_the_file_is_no_division_by_zero(make: Make, check: Check) -> None:
    path = make(dtype="float32")
    with store.open_artifact(path) as artifact:
        embeddings = np.array(artifact["sample/embedding"])
    embeddings[2] = 0
    numbers = check(rewrite(path, sample_embedding=embeddings)).as_json()
    assert (numbers["num_differing"], numbers["worst"][0]["relative_error"]) == (1, 1.0)


def test_damaged_samples_are_found_before_anything_is_embedded(
    make: Make, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    with store.open_artifact(path) as artifact:
        offset = artifact.stored("sample/embedding").location.offset
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 1
    path.write_bytes(content)
    embed, calls = Teacher.embed, []

    def count(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return embed(self, pixels)

    monkeypatch.setattr(Teacher, "embed", count)
    monkeypatch.setattr("pipeline.extract.again._BYTES_WITHOUT_BAR", 0)
    with pytest.raises(store.ArtifactDigestError, match=r"a.safetensors: sample/embedding has SHA-256"):
        check(path)
    assert len(calls) == 2  # the trial image
    check(make("b.safetensors"))


# Class means


def test_other_images_of_a_class_differ(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    path = make(samples=False, per_class=4)
    shuffled = save(training_rows(saved_data).shuffle(seed=1), tmp_path / "shuffled")
    result = check(path, data=shuffled)
    assert result.verdict() == (
        "3 of 3 classes differ from the file's. Likely cause: other images or labels, since these are drawn by row, "
        "and re-ordered data gives others."
    )
    assert row_texts(result, "worst")[0].startswith("class ")
    assert check(make("all.h5", samples=False, per_class="all"), data=shuffled).matches


def test_other_counts_are_named(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    path = make(samples=False, per_class="all")
    few = save(training_rows(saved_data).select(range(28)), tmp_path / "few")
    result = check(path, data=few)
    assert result.as_json()["failures"] == (
        "2 classes have other counts (bee has 9 images, the file says 10, cat has 9 images, the file says 10)",
    )
    assert not result.matches
    assert result.verdict().startswith("2 classes have other counts (bee has 9 images, ")


def test_classes_that_the_data_lacks_are_named(make: Make, check: Check, saved_data: Path, tmp_path: Path) -> None:
    rows = training_rows(saved_data)
    two = save(rows.select([row for row, label in enumerate(rows["label"]) if label != 1]), tmp_path / "two")
    result = check(make(samples=False, per_class=4), data=two)
    assert result.verdict() == "matches: 2 of 3 classes"
    assert row_texts(result, "note") == ["the data lacks 1 of the file's 3 classes (bee)"]


@pytest.mark.parametrize("how", ["merged", "dropped"])
def test_class_means_of_unknown_images_cannot_be_checked(make: Make, check: Check, tmp_path: Path, how: str) -> None:
    path, out = make(samples=False), tmp_path / "out.safetensors"
    if how == "merged":
        store.merge_artifacts([path, make("b.safetensors", samples=False, per_class=3)], out)
    else:
        store.convert_artifact(path, out, Conversion(drop_classes=("bee",)))
    assert refusal(check, out, teacher="./nowhere") == (
        "out.safetensors: was made from other artifacts and holds no samples: which images its class means are of is "
        "not known. Check what it was made from."
    )


# Artifacts made from others, and strangers' ones


def test_samples_of_a_merge_and_of_some_classes_match(
    make: Make, check: Check, saved_data: Path, tmp_path: Path
) -> None:
    merged, dropped = tmp_path / "merged.h5", tmp_path / "dropped.h5"
    test = make("test.h5", data=data_of(saved_data, split="test"))
    store.merge_artifacts([make(), test], merged)
    assert refusal(check, merged) == (
        "merged.h5: was merged from the splits train + test. Pass one of them as --split."
    )
    result = check(merged, data=data_of(saved_data, split="test"))
    assert result.verdict() == "matches: 12 of 42 samples"
    store.convert_artifact(tmp_path / "a.safetensors", dropped, Conversion(drop_classes=("bee",)))
    result = check(dropped)
    assert result.verdict() == "matches: 20 of 20 samples"
    assert result.as_json()["num_absent"] == 0


def test_views_of_another_version_are_refused(make: Make, check: Check) -> None:
    path = make(views=2, view_size=16)
    with store.open_artifact(path) as artifact:
        sampling = artifact.manifest.sampling.model_copy(update={"views_version": VIEWS_VERSION + 1})
    assert refusal(check, rewrite(path, {"sampling": sampling}), teacher="./nowhere").startswith(
        f"a.safetensors: its views are of version {VIEWS_VERSION + 1}, this program renders version {VIEWS_VERSION}. "
    )


def test_a_manifest_that_cannot_be_followed_is_one_line(make: Make, check: Check) -> None:
    path = make()
    with store.open_artifact(path) as artifact:
        teacher = artifact.manifest.teacher.model_copy(update={"pooling": "max"})
    assert refusal(check, rewrite(path, {"teacher": teacher})) == (
        "a.safetensors: its manifest asks for what this program cannot do again (pooling: input should be 'auto', "
        "'cls', 'distilled', 'pooled', 'mean' or 'projected', found 'max'). Update clip-embed-kd, or extract again."
    )


def test_several_processes_are_refused(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(check, Path("none.h5")) == "--check works in one process: start it without torchrun."


def test_nothing_is_written(make: Make, check: Check, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make()
    before = sorted(path.name for path in tmp_path.iterdir()), path.read_bytes()
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        check(path)
    assert (sorted(path.name for path in tmp_path.iterdir()), path.read_bytes()) == before
