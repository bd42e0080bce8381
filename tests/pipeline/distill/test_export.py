import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

import cli
from pipeline.distill import export as module
from pipeline.distill.export import export_student
from pipeline.distill.images import fit_to
from pipeline.distill.onnx_model import Gap
from pipeline.distill.student import Student, load_student, save_student
from pipeline.errors import PipelineError
from tests.pipeline.distill.examples import file_names, make_student
from tests.test_architecture import ALONE

ROOT = Path(__file__).parents[3]
NAMES = ("ant", "Käfer, grün", "猫")
RECORD = {
    "artifact": {"file": "a.h5", "teacher": {"name": "owner/teacher", "licence": "apache-2.0"}},
    "data": {"name": "owner/images", "licence": "mit", "join": {"num_images": 30}},
    "result": {"top1": 51.0, "top5": 100.0},
}


def write_run(folder: Path, student: Student) -> Path:
    folder.mkdir()
    save_student(student, folder / "student")
    (folder / "run.json").write_text(json.dumps(RECORD), "utf-8")
    return folder


def metadata_of(path: Path) -> dict[str, Any]:
    stored = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {name: json.loads(value) for name, value in stored.items()}


def run_snippet(folder: Path, image: Image.Image) -> Any:
    """Run what docs/export.md shows in a folder with student.onnx; returns its logits."""
    page = (ROOT / "docs" / "export.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert not re.search(r"import (torch|timm|transformers|pipeline|store)", code)
    image.save(folder / "photo.png")
    names: dict[str, Any] = {"print": lambda *values: None}
    exec(
        code.replace('"photo.jpg"', repr(str(folder / "photo.png"))).replace("student.onnx", f"{folder}/student.onnx"),
        names,
    )
    return names["logits"], names["pixels"]


def random_image(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("test_resnet", 8, NAMES)


@pytest.fixture(scope="module")
def run(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", student)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    command = ["export", "--student", str(run), "--out", str(folder / "student.onnx"), "--json"]
    done = CliRunner().invoke(cli.cli, command, catch_exceptions=False)
    (folder / "printed.json").write_text(done.stdout)
    return folder / "student.onnx"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in no time, with an outcome as it should be."""
    monkeypatch.setattr(module, "encode_onnx", lambda student, metadata: b"new")
    monkeypatch.setattr(
        module, "compare_onnx", lambda content, student: {"logits": Gap(1e-6, 2.0), "embedding": Gap(0.0, 1.0)}
    )


def refusal(run: Path, out: Path, **options: Any) -> str:
    before = file_names(out.parent)
    with pytest.raises(PipelineError) as caught:
        export_student(run, out, **options)
    assert file_names(out.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The file


def test_the_command_says_what_it_wrote(exported: Path) -> None:
    found = json.loads((exported.parent / "printed.json").read_text())
    assert found.pop("max_difference") < 1e-5
    assert found.pop("max_logit") > 0.01
    assert found == {
        "path": str(exported),
        "model_bytes": exported.stat().st_size,
        "opset": 18,
        "image_size": 8,
        "num_classes": 3,
        "embed_dim": 96,
        "num_compared": 8,
    }
    assert file_names(exported.parent) == ["printed.json", "student.onnx"]
    assert exported.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_metadata_says_how_to_use_it_and_where_it_comes_from(exported: Path) -> None:
    found = metadata_of(exported)
    assert set(found.pop("software")) == {"clip-embed-kd", "onnx", "onnxscript", "python", "timm", "torch"}
    assert found == {
        "architecture": "test_resnet",
        "class_names": list(NAMES),
        "preprocessing": {
            "colour": "RGB",
            "resize_shorter_side": 8,
            "interpolation": "bicubic",
            "antialias": True,
            "centre_crop": 8,
            "inside_the_model": {"divide_by": 255, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        },
        "artifact": RECORD["artifact"],
        "data": {"name": "owner/images", "revision": None, "licence": "mit"},
        "accuracy": {"top1": 51.0, "top5": 100.0},
    }


@pytest.mark.parametrize(("height", "width"), [(8, 8), (48, 40), (9, 31), (5, 17), (3, 100), (21, 8)])
def test_the_code_in_the_docs_makes_the_students_own_pixels(
    height: int, width: int, exported: Path, student: Student
) -> None:
    image = random_image(height, width)
    logits, pixels = run_snippet(exported.parent, image)
    expected = np.array(fit_to(8)(image))
    assert (pixels[0] == expected).all()
    with torch.no_grad():
        assert np.abs(student(student.normalise(torch.from_numpy(expected)[None]))[1].numpy() - logits).max() < 1e-4


def test_a_student_alone_says_nothing_of_a_run(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "encode_onnx", lambda student, metadata: seen.update(metadata) or b"new")
    save_student(student, tmp_path / "alone")
    export_student(tmp_path / "alone", tmp_path / "a.onnx")
    assert set(seen) == {"architecture", "class_names", "preprocessing", "software"}


def test_the_students_folder_in_a_run_names_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "encode_onnx", lambda student, metadata: seen.update(metadata) or b"new")
    export_student(run / "student", tmp_path / "a.onnx")
    assert seen["data"] == {"name": "owner/images", "revision": None, "licence": "mit"}


def test_an_older_file_is_replaced_only_if_asked(run: Path, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "a.onnx"
    out.write_bytes(b"old")
    assert refusal(run, out) == f"{out}: exists. Choose another --out, or pass --overwrite."
    assert out.read_bytes() == b"old"
    export_student(run, out, overwrite=True)
    assert out.read_bytes() == b"new"
    assert file_names(tmp_path) == ["a.onnx"]


def test_the_command_prints_a_few_lines(run: Path, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "a.onnx"
    done = CliRunner().invoke(cli.cli, ["export", "--student", str(run), "--out", str(out)], catch_exceptions=False)
    assert done.stdout.splitlines() == [
        f"model    {out}, 3 B, opset 18",
        "input    pixels: uint8 [batch, 8, 8, 3], RGB; mean and deviation are in the model",
        "outputs  logits [batch, 3], embedding [batch, 96]",
        "checked  8 random images: logits of up to 2 differ from PyTorch's by at most 1.0e-06",
    ]


# What is refused before anything is computed


def test_another_suffix_is_refused(run: Path) -> None:
    out = run / "student" / "model.safetensors"
    assert refusal(run, out, overwrite=True) == f"{out}: the name of an ONNX file ends in .onnx, found '.safetensors'."


def test_a_folder_is_not_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    out.mkdir()
    assert refusal(run, out, overwrite=True) == f"{out}: is a folder. Choose another --out."


def test_a_missing_folder_is_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "a.onnx"
    with pytest.raises(PipelineError) as caught:
        export_student(run, out)
    assert str(caught.value) == f"{out}: the folder {out.parent} does not exist. Make it first."


def test_what_is_no_student_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, tmp_path / "a.onnx") == (
        f"{tmp_path}: no student here (config.json is missing). Pass a run directory."
    )


def test_a_damaged_record_is_named(student: Student, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", student)
    (run / "run.json").write_text("{")
    assert refusal(run, tmp_path / "a.onnx") == (
        f"{run}/run.json: cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))."
    )


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_names_the_extra(
    library: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert refusal(run, tmp_path / "a.onnx") == (
        f"export needs {library}, which is not installed: pip install 'clip-embed-kd[export]'"
    )


def test_weights_that_one_file_cannot_hold_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WEIGHT_BYTES", 1_000_000)
    assert refusal(run, tmp_path / "a.onnx") == (
        f"{run}: the student has 1.5 MB of weights, one ONNX file holds 1.0 MB. Train a smaller student."
    )


def test_a_disk_too_small_is_said_before(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert refusal(run, tmp_path / "a.onnx") == (
        f"{tmp_path}/a.onnx: about 11.5 MB are needed, 1.0 kB are free. Make room or choose another --out."
    )


# What goes wrong later


def test_a_student_that_cannot_be_exported_is_refused_with_the_reason(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(student: Student, metadata: dict[str, Any]) -> bytes:
        try:
            raise ValueError("unbacked symint\nand pages of advice")
        except ValueError as error:
            raise RuntimeError("Failed to export.\n\nPlease report.") from error

    monkeypatch.setattr(module, "encode_onnx", fail)
    assert refusal(run, tmp_path / "a.onnx") == (
        f"{run}: cannot be exported to ONNX (ValueError: unbacked symint). Nothing was written."
    )


def test_a_file_that_onnxruntime_cannot_run_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "encode_onnx", lambda student, metadata: b"junk")
    assert refusal(run, tmp_path / "a.onnx").startswith(f"{run}: cannot be exported to ONNX (ValueError: ")


@pytest.mark.parametrize(
    ("name", "gap", "accepted"),
    [
        ("logits", Gap(0.99e-4, 0.1), True),
        ("logits", Gap(1.1e-4, 0.1), False),
        ("logits", Gap(0.99e-2, 100.0), True),
        ("embedding", Gap(1.1e-2, 100.0), False),
        ("logits", Gap(float("nan"), 1.0), False),
        ("embedding", Gap(float("nan"), float("nan")), False),
    ],
)
def test_outputs_must_agree_to_a_ten_thousandth(
    name: str, gap: Gap, accepted: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(
        module,
        "compare_onnx",
        lambda content, student: {"logits": Gap(0.0, 1.0), "embedding": Gap(0.0, 1.0), name: gap},
    )
    out = tmp_path / "a.onnx"
    if accepted:
        assert export_student(run, out).max_difference == gap.difference
        return
    assert refusal(run, out) == (
        f"{run}: onnxruntime and PyTorch differ by {gap.difference:.1e} in {name} of up to {gap.scale:.1e}; "
        "0.0001 of that, or of 1, is allowed. Nothing was written."
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_a_disk_that_fails_leaves_the_old_file(
    error: OSError, reason: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def fail(handle: int) -> None:
        raise error

    out = tmp_path / "a.onnx"
    out.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    assert refusal(run, out, overwrite=True) == f"{out}: cannot be written ({reason})."
    assert out.read_bytes() == b"old"


def test_an_interruption_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_student(run, tmp_path / "a.onnx")
    assert file_names(tmp_path) == []


# Three ways to open one student


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "test_efficientnet"])
def test_timm_transformers_and_onnxruntime_compute_equal_logits_from_one_image(name: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    run = write_run(tmp_path / "run", make_student(name, 32, NAMES))
    export_student(run, tmp_path / "student.onnx")
    folder, ours = run / "student", load_student(run)
    first = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(first), is_training=False)
    second, processor = (
        AutoModelForImageClassification.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder),
    )
    for height, width in ((32, 32), (48, 40), (20, 90)):
        image = random_image(height, width)
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(fit_to(32)(image)))[None]
            expected = ours(ours.normalise(pixels))[1]
            assert torch.equal(first(transform(image)[None]), expected)
            assert torch.equal(second(**processor(image, return_tensors="pt")).logits, expected)
        logits, _ = run_snippet(tmp_path, image)
        assert np.abs(logits - expected.numpy()).max() <= 1e-4


@pytest.mark.slow
def test_neither_the_teachers_library_nor_the_network_is_needed(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, "export", "--student", str(run), "--out", str(tmp_path / "a.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "Exporting test_resnet: seconds for most models, minutes for some.\n"
    assert len(done.stdout.splitlines()) == 4
