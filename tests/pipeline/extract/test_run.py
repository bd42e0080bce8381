"""Stage one from end to end: settings in, artifact out, and nothing left behind by a failure."""

import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

import store
from pipeline.data import DataSettings
from pipeline.errors import PipelineError
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.extract.preparation import choose_num_workers
from pipeline.extract.sampling import sample_rows
from pipeline.extract.teacher import Teacher
from pipeline.pixels import sample_key
from tests.conftest import CLASS_NAMES, make_images

ADVICE = "Mend or remove it, or pass --skip-bad to leave such images out and count them."
SUFFIXES = (".safetensors", ".h5")

Run = Callable[..., ExtractResult]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where an artifact may be written, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "a.safetensors"


@pytest.fixture
def run(tiny_teacher: Path, saved_data: Path, out: Path) -> Run:
    """Run stage one on the tiny teacher and data, but for what is given."""

    def run_extract(**options: Any) -> ExtractResult:
        given: dict[str, Any] = {"teacher": str(tiny_teacher), "data": data_of(saved_data), "out": out}
        return extract(ExtractSettings(**(given | {"device": "cpu", "precision": "float32"} | options)))

    return run_extract


def data_of(folder: Path, **options: Any) -> DataSettings:
    return DataSettings(dataset=str(folder), **options)


def png(image: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def save_cells(folder: Path, cells: list[Any], labels: list[int], names: tuple[str, ...] = ("no", "yes")) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    rows.save_to_disk(str(folder))
    return folder


@pytest.fixture
def damaged_data(tmp_path: Path) -> Path:
    """Six images in two classes; rows 3 and 4 cannot be decoded."""
    cells: list[Any] = [png(image) for image in make_images(6, 0)]
    cells[3] = None
    cells[4] = {"bytes": cells[4]["bytes"][:60], "path": None}
    return save_cells(tmp_path / "damaged", cells, [0, 1, 0, 1, 0, 1])


def tensors_of(path: Path) -> dict[str, NDArray[Any]]:
    with store.open_artifact(path) as artifact:
        return {name: np.array(artifact[name]) for name in artifact.manifest.tensors}


def refusal(run: Run, **options: Any) -> str:
    with pytest.raises(PipelineError) as error:
        run(**options)
    return str(error.value)


def own_embeddings(teacher: Path, images: list[Image.Image]) -> NDArray[np.float32]:
    """Embed one image at a time without the pipeline."""
    model = transformers.AutoModel.from_pretrained(teacher).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(teacher)
    with torch.no_grad():
        rows = [model(**processor([image], return_tensors="pt")).last_hidden_state[:, 0] for image in images]
    embeddings: NDArray[np.float32] = torch.cat(rows).numpy()
    return embeddings


def error_of(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def fail_in_batch(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace what the teacher makes of a batch, counted from 1; before them come two runs of its trial image."""
    embed, calls = Teacher.embed, iter(range(1_000))

    def embed_or_fail(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = embed(self, pixels)
        return do(embeddings) if next(calls) == number + 1 else embeddings

    monkeypatch.setattr(Teacher, "embed", embed_or_fail)


def interrupt(embeddings: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


# What is in the artifact


def test_class_statistics_are_those_of_the_teachers_embeddings(run: Run, tiny_teacher: Path, out: Path) -> None:
    result = run(per_class=4, seed=5, batch_size=5)
    labels = np.arange(30, dtype=np.int64) % 3
    rows, _ = sample_rows(labels, CLASS_NAMES, 4, 5)
    images = make_images(30, 0)
    embeddings = own_embeddings(tiny_teacher, [images[row] for row in rows]).astype(np.float64)
    tensors = tensors_of(out)
    assert tensors["class/count"].tolist() == [4, 4, 4]
    for index in range(3):
        chosen = embeddings[labels[rows] == index]
        assert error_of(tensors["class/mean"][index], chosen.mean(axis=0)) <= 1e-5
        assert error_of(tensors["class/m2"][index], chosen.var(axis=0) * 4) <= 1e-4
    assert result.num_images == 12


def test_the_manifest_says_how_the_artifact_was_made(run: Run, out: Path, tiny_teacher: Path, saved_data: Path) -> None:
    result = run(per_class=4, seed=5, batch_size=5)
    with store.open_artifact(out) as artifact:
        manifest = artifact.manifest
    assert manifest == result.manifest
    teacher, data_set, sampling = manifest.teacher, manifest.data_set, manifest.sampling
    assert (teacher.name, teacher.architecture, teacher.pooling) == ("tiny-vit", "ViTModel", "cls")
    assert (teacher.embed_dim, teacher.precision) == (24, "float32")
    assert (data_set.name, data_set.split, data_set.rows) == ("saved", "train", 30)
    assert (data_set.image_column, data_set.label_column, data_set.classes_named) == ("image", "label", True)
    assert (sampling.per_class, sampling.seed, sampling.batch_size, sampling.limit) == (4, 5, 5, None)
    assert (sampling.short_classes, sampling.skipped_images, sampling.views) == (0, 0, 1)
    assert manifest.classes == CLASS_NAMES
    assert manifest.preprocessing["image_processor_type"] == "ViTImageProcessor"
    assert {"python", "torch", "transformers", "datasets"} <= set(manifest.software)
    for path in (tiny_teacher, saved_data, out):
        assert str(path.parent) not in manifest.to_bytes().decode()


def test_figures_come_with_the_result(run: Run, out: Path) -> None:
    result = run(per_class=2)
    assert result.path == out
    assert result.artifact_bytes == out.stat().st_size
    assert result.seconds > 0
    assert result.images_per_second > 0
    assert result.memory.resident_bytes > 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.report.html", "a.report.json", out.name]


def test_sample_embeddings_are_the_teachers(run: Run, tiny_teacher: Path, out: Path) -> None:
    run(samples=True, dtype="float32", batch_size=1)
    images = make_images(30, 0)
    tensors = tensors_of(out)
    assert tensors["sample/embedding"].shape == (30, 1, 24)
    with store.open_artifact(out) as artifact:
        keys = np.array([list(sample_key(image)) for image in images], np.uint8)
        rows = artifact.find(keys, np.arange(30) % 3)
    assert sorted(rows.tolist()) == list(range(30))
    assert np.array_equal(tensors["sample/embedding"][rows, 0], own_embeddings(tiny_teacher, images))
    assert tensors["class/count"].tolist() == [10, 10, 10]


def test_samples_are_stored_in_float16_unless_asked_otherwise(run: Run, out: Path) -> None:
    run(samples=True)
    half = tensors_of(out)["sample/embedding"]
    run(samples=True, dtype="float32", overwrite=True)
    full = tensors_of(out)["sample/embedding"]
    assert (half.dtype.name, full.dtype.name) == ("float16", "float32")
    assert np.array_equal(half, full.astype(np.float16))


def test_equal_images_are_joined_within_a_class_and_kept_apart_between_classes(
    run: Run, out: Path, tmp_path: Path
) -> None:
    first, second, third = make_images(3, 0)
    cells = [png(image) for image in (first, first, second, second, third)]
    folder = save_cells(tmp_path / "repeats", cells, [0, 1, 0, 0, 1])
    result = run(data=data_of(folder), samples=True)
    tensors = tensors_of(out)
    stored = {(key.tobytes(), label) for key, label in zip(tensors["sample/key"], tensors["sample/label"], strict=True)}
    assert stored == {(sample_key(first), 0), (sample_key(first), 1), (sample_key(second), 0), (sample_key(third), 1)}
    assert len(tensors["sample/key"]) == 4
    assert tensors["class/count"].tolist() == [3, 2]
    assert result.num_images == 5


@pytest.mark.parametrize("mode", ["grey", "alpha"])
def test_grey_and_transparent_images_give_what_their_rgb_gives(run: Run, out: Path, tmp_path: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    if mode == "grey":
        values = random.integers(0, 256, (6, 8, 8), dtype=np.uint8)
        images, plain = values, np.repeat(values[..., None], 3, axis=3)
    else:
        images = random.integers(0, 256, (6, 8, 8, 4), dtype=np.uint8)
        colour, alpha = images[..., :3].astype(int), images[..., 3:].astype(int)
        plain = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    tensors = []
    for name, arrays in (("odd", images), ("plain", plain)):
        cells = [png(Image.fromarray(array)) for array in arrays]
        run(data=data_of(save_cells(tmp_path / name, cells, [0, 1] * 3)), samples=True, overwrite=True)
        tensors.append(tensors_of(out))
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


def test_labels_without_names_are_numbered(run: Run, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": make_images(4, 0), "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "numbers"))
    manifest = run(data=data_of(tmp_path / "numbers")).manifest
    assert (manifest.classes, manifest.data_set.classes_named) == (("0", "1"), False)


def test_a_limit_is_written_down(run: Run, saved_data: Path) -> None:
    manifest = run(data=data_of(saved_data, limit=6)).manifest
    assert (manifest.sampling.limit, manifest.data_set.rows) == (6, 30)


def test_every_image_of_the_split_is_embedded_where_all_are_asked_for(run: Run, saved_data: Path, out: Path) -> None:
    run(per_class="all", data=data_of(saved_data, split="test"))
    assert tensors_of(out)["class/count"].tolist() == [4, 4, 4]


def test_bfloat16_is_written_down(run: Run) -> None:
    assert run(per_class=2, precision="bfloat16").manifest.teacher.precision == "bfloat16"


# Same settings, same bytes


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("samples", [False, True])
def test_the_same_command_gives_the_same_bytes(run: Run, out: Path, suffix: str, samples: bool) -> None:
    paths = [out.with_name(f"{name}{suffix}") for name in ("one", "two")]
    for path in paths:
        run(out=path, samples=samples)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_worker_processes_change_no_byte(run: Run, out: Path) -> None:
    contents = []
    for workers in (0, 2):
        run(samples=True, batch_size=7, workers=workers, overwrite=True)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


def test_both_containers_hold_the_same_tensors(run: Run, out: Path) -> None:
    manifests = [run(out=out.with_suffix(suffix), samples=True, overwrite=True).manifest for suffix in SUFFIXES]
    assert manifests[0] == manifests[1]
    one, two = (tensors_of(out.with_suffix(suffix)) for suffix in SUFFIXES)
    assert list(one) == list(two)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_the_batch_size_does_not_matter_beyond_rounding(run: Run, out: Path) -> None:
    run(samples=True, dtype="float32", batch_size=7)
    expected = tensors_of(out)
    for batch_size in (1, 30, 1000):
        run(samples=True, dtype="float32", batch_size=batch_size, overwrite=True)
        found = tensors_of(out)
        assert np.array_equal(found["sample/key"], expected["sample/key"])
        assert np.array_equal(found["class/count"], expected["class/count"])
        for name in ("class/mean", "sample/embedding"):
            assert error_of(found[name], expected[name]) <= 1e-5


def test_another_seed_gives_other_images(run: Run) -> None:
    digests = {run(per_class=3, seed=seed, overwrite=True).manifest.sampling.images_sha256 for seed in (0, 1)}
    assert len(digests) == 2


# What is told


def test_the_teacher_and_short_classes_are_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        result = run(per_class=11)
    assert caplog.messages[:2] == [
        "3 of 3 classes have fewer than 11 images; all of theirs are used.",
        "Teacher tiny-vit (ViTModel): the embedding is [CLS] after the last norm, 24 values, in float32 on cpu.",
    ]
    assert result.manifest.sampling.short_classes == 3


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    run: Run, damaged_data: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        result = run(data=data_of(damaged_data), samples=True, skip_bad=True, batch_size=1)
    assert "2 images could not be decoded and were left out." in caplog.messages
    assert (result.num_images, result.manifest.sampling.skipped_images) == (4, 2)
    tensors = tensors_of(out)
    assert tensors["class/count"].tolist() == [2, 2]
    expected = {sample_key(image) for row, image in enumerate(make_images(6, 0)) if row not in (3, 4)}
    assert {key.tobytes() for key in tensors["sample/key"]} == expected


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("cuda", 8), ("mps", 0)])
def test_only_beside_a_cuda_gpu_do_other_processes_decode(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    settings = ExtractSettings(teacher="t", data=data_of(Path("d")), out=Path("a.h5"))
    assert choose_num_workers(settings, torch.device(device)) == expected
    assert choose_num_workers(settings.model_copy(update={"workers": 3}), torch.device(device)) == 3
    for sharing, each in ((4, 4), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
        assert choose_num_workers(settings, torch.device(device)) == min(each, expected)


# Refusals: every one leaves the folder as it was


@pytest.fixture
def nothing_left(out: Path) -> Iterator[None]:
    """Check after the test that nothing lies in the folder of the output."""
    yield
    assert list(out.parent.iterdir()) == []


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_image_that_cannot_be_decoded_is_named(run: Run, damaged_data: Path, workers: int) -> None:
    assert refusal(run, data=data_of(damaged_data), samples=True, workers=workers) == (
        f"{damaged_data}, split train, row 3: the image cannot be decoded (the cell is empty). {ADVICE}"
    )


def test_a_class_of_which_no_image_can_be_decoded_is_refused(run: Run, out: Path, tmp_path: Path) -> None:
    cells = [png(make_images(1, 0)[0]), None, None]
    folder = save_cells(tmp_path / "damaged", cells, [0, 1, 1])
    assert refusal(run, data=data_of(folder), samples=True, skip_bad=True) == (
        "1 of 2 classes have no image (yes). Every class needs at least one: "
        "choose another split, raise --limit, or remove the class from the data set."
    )
    assert not out.exists()


@pytest.mark.usefixtures("nothing_left")
def test_a_class_without_images_is_refused_before_the_teacher_is_loaded(run: Run, tmp_path: Path) -> None:
    folder = save_cells(tmp_path / "two", [png(make_images(1, 0)[0])], [1])
    assert refusal(run, data=data_of(folder), teacher="./nowhere").startswith("1 of 2 classes have no image (no). ")


def test_an_existing_artifact_is_kept_unless_it_may_be_replaced(run: Run, out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(store.ArtifactWriteError) as error:
        run(teacher="./nowhere")
    assert str(error.value) == f"{out}: exists. Choose another --out, or pass --overwrite."
    assert out.read_bytes() == b"old"
    run(per_class=2, overwrite=True)
    assert tensors_of(out)["class/count"].tolist() == [2, 2, 2]


def test_a_folder_cannot_be_replaced_by_an_artifact(run: Run, out: Path) -> None:
    out.mkdir()
    with pytest.raises(store.ArtifactWriteError) as error:
        run(teacher="./nowhere", overwrite=True)
    assert str(error.value) == f"{out}: is a folder. Choose another --out."


def test_an_existing_artifact_survives_a_failure(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.write_bytes(b"old")
    fail_in_batch(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(samples=True, overwrite=True)
    assert [(path.name, path.read_bytes()) for path in out.parent.iterdir()] == [(out.name, b"old")]


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_folder_is_refused_first(run: Run, out: Path) -> None:
    path = out.parent / "none" / "a.safetensors"
    with pytest.raises(store.ArtifactWriteError) as error:
        run(out=path, teacher="./nowhere")
    assert str(error.value) == f"{path}: the folder {path.parent} does not exist. Make it first."


@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_kind_of_file_is_refused_first(run: Run, out: Path) -> None:
    path = out.with_suffix(".pt")
    with pytest.raises(store.StoreError) as error:
        run(out=path, teacher="./nowhere")
    assert str(error.value) == f"{path}: an artifact's name ends in .safetensors, .h5, .hdf5, found '.pt'."


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("options", "free", "needed"),
    [
        ({}, 4703, "4.7 kB"),  # three classes, mean, m2 and head of 24 float32; chunks of 30 × (24 float32, 32 bytes)
        ({"samples": True}, 6743, "6.7 kB"),  # and 30 × (24 float16, a key and a label)
        ({"samples": True, "dtype": "float32"}, 8183, "8.2 kB"),
    ],
)
def test_the_disk_must_have_room_before_anything_is_embedded(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], free: int, needed: str
) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    fail_in_batch(monkeypatch, 1, interrupt)
    assert refusal(run, **options) == (
        f"{out}: about {needed} are needed, {free / 1000:.1f} kB are free. Make room or choose another --out."
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free + 1))
    with pytest.raises(KeyboardInterrupt):
        run(**options)


def test_what_an_earlier_run_wrote_needs_no_room_again(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(path: Path, needed_bytes: int, *, replaceable: bool) -> None:
        asked.append(needed_bytes)

    monkeypatch.setattr("pipeline.extract.run.check_output", note)
    with monkeypatch.context() as context:
        fail_in_batch(context, 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(samples=True, batch_size=8)
    written = sum(path.stat().st_size for path in out.parent.rglob("*.npy"))
    assert written > 24 * 24 * 4
    assert run(samples=True, batch_size=8).num_resumed == 24
    assert asked == [asked[0], asked[0] - written]


def test_a_folder_that_is_not_ours_is_left_alone(run: Run, out: Path) -> None:
    folder = out.with_name(out.name + ".partial")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        assert refusal(run, overwrite=overwrite) == (
            f"{folder}: is in the way: no extraction made it. Move it, or choose another --out."
        )
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_report_split_without_an_image_is_one_line(run: Run, damaged_data: Path, tmp_path: Path) -> None:
    bad = datasets.load_from_disk(str(damaged_data)).select([3, 4, 4])
    good = datasets.load_from_disk(str(damaged_data)).select([0, 1, 2, 5])
    folder = tmp_path / "both"
    datasets.DatasetDict(train=good, test=bad).save_to_disk(str(folder))
    assert refusal(run, data=data_of(folder), skip_bad=True, report_split="test") == (
        "--report-split test: none of its images can be decoded. Choose another one."
    )


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "train",
            "--report-split train: is the split that is embedded, so nothing would be unseen. Name another, or leave "
            "the option out: a fifth of the images is then held out.",
        ),
        ("none", "{folder}: no split 'none'. It has 'train', 'test'."),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_a_report_split_that_measures_nothing_is_refused(run: Run, saved_data: Path, split: str, message: str) -> None:
    assert refusal(run, report_split=split) == message.replace("{folder}", str(saved_data))


@pytest.mark.usefixtures("nothing_left")
def test_a_report_split_with_other_classes_is_refused(run: Run) -> None:
    assert refusal(run, rows=(0, 2), report_split="test") == (
        "--report-split test: 1 of its classes are not among those that are embedded (cat). Choose another split, or "
        "extract all classes."
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((0, 31), "--rows 0:31: the split has 30 rows."),
        ((5, 6), None),
        ((0, 1), None),
        ((29, 30), None),
    ],
)
def test_rows_must_be_those_of_the_split(run: Run, rows: tuple[int, int], message: str | None) -> None:
    if message is None:
        assert run(rows=rows).num_images == 1
    else:
        assert refusal(run, rows=rows) == message


@pytest.mark.usefixtures("nothing_left")
def test_without_the_library_of_teachers_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.extract.teacher")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal(run) == ("extract needs transformers, which is not installed: pip install 'clip-embed-kd[extract]'")


@pytest.mark.usefixtures("nothing_left")
def test_an_absent_device_is_refused_before_the_data_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refusal(run, device="cuda", data=data_of(Path("./nowhere")))
    assert message.startswith("device 'cuda': PyTorch sees 0 CUDA devices. ")


def test_a_bad_image_costs_nothing_but_the_option_that_leaves_it_out(run: Run, damaged_data: Path) -> None:
    options: dict[str, Any] = {"data": data_of(damaged_data), "samples": True, "batch_size": 1}
    assert "row 3: the image cannot be decoded" in refusal(run, **options)
    result = run(skip_bad=True, **options)
    assert (result.num_resumed, result.num_images) == (3, 4)


def test_images_that_an_earlier_run_left_out_are_not_forgotten(
    run: Run, damaged_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": data_of(damaged_data), "samples": True, "batch_size": 1}
    with monkeypatch.context() as context:
        fail_in_batch(context, 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(skip_bad=True, **options)
    assert refusal(run, **options) == (
        f"{out}.partial: an earlier run left out 2 images that could not be decoded. Pass --skip-bad again, or "
        "--overwrite to start anew."
    )
    assert run(skip_bad=True, **options).manifest.sampling.skipped_images == 2


def test_a_teacher_that_gives_nan_is_named_with_the_row(
    run: Run, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        embeddings[2, 5] = float("nan")
        embeddings[3, 0] = float("inf")
        return embeddings

    fail_in_batch(monkeypatch, 2, damage)
    assert refusal(run, samples=True, batch_size=8) == (
        f"{tiny_teacher}: the embedding of row 10 has values that are not finite. "
        "Try --precision float32; if that does not help, the teacher's weights are damaged."
    )


def test_an_embedding_too_large_for_float16_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    too_large = "an embedding reaches 1e+05, float16 ends at 6.55e+04. Pass --dtype float32."
    fail_in_batch(monkeypatch, 2, lambda embeddings: torch.full_like(embeddings, 1e5))
    with pytest.raises(store.ArtifactWriteError) as error:
        run(samples=True, batch_size=8)
    assert str(error.value) == too_large
    fail_in_batch(monkeypatch, 1, lambda embeddings: torch.full_like(embeddings, 1e5))
    assert run(samples=True, batch_size=8, dtype="float32").num_resumed == 8  # as the message advises


@pytest.mark.usefixtures("nothing_left")
def test_a_batch_that_does_not_fit_gives_advice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(embeddings: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    fail_in_batch(monkeypatch, 1, exhaust)
    assert refusal(run, batch_size=8) == "out of memory: the teacher at batch size 8. Try --batch-size 4."


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_leaves_its_finished_batches(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, workers: int
) -> None:
    fail_in_batch(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(out=out.with_suffix(suffix), samples=True, batch_size=8, workers=workers)
    (left,) = out.parent.iterdir()
    assert left.name == f"a{suffix}.partial"
    assert sorted(path.suffixes for path in left.iterdir() if path.name != "lock") == [[".begun", ".npy"], [".json"]]


@pytest.mark.usefixtures("nothing_left")
def test_a_run_that_is_interrupted_at_once_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_batch(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(samples=True, batch_size=8)


def test_a_decoding_process_that_dies_is_one_line(
    tiny_teacher: Path, saved_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(embeddings: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    fail_in_batch(monkeypatch, 1, die)
    with pytest.raises(PipelineError) as refused:
        extract(ExtractSettings(teacher=str(tiny_teacher), data=data_of(saved_data), out=tmp_path / "a.h5"))
    assert str(refused.value) == (
        "a decoding process died, for want of memory or of shared memory (/dev/shm). "
        "Try --workers 0, or a smaller --batch-size."
    )
    assert list(tmp_path.iterdir()) == []
