"""What holds the house together: who imports whom, what ships, what works without the teacher's library."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import store

ROOT = Path(__file__).parent.parent
# No teacher's library and no network: what is left must be enough for the student's machine.
ALONE = """
import sys, socket
for name in ("transformers", "huggingface_hub.transformers"):
    sys.modules[name] = None
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
import cli
sys.argv = ["clip-embed-kd", *sys.argv[1:]]
cli.main()
"""


def test_the_store_loads_neither_torch_nor_the_pipeline() -> None:
    check = "import store, store.hdf5_backend, sys; print([m for m in ('torch', 'pipeline') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stage_two_does_not_load_the_teachers_library() -> None:
    check = (
        "import cli, sys, pipeline.distill, pipeline.distill.evaluate, pipeline.distill.predict; "
        "print([m for m in sys.modules if m.split('.')[0] == 'transformers'])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_students_commands_work_without_teacher_library_and_network(
    tiny_teacher: Path, saved_data: Path, tmp_path: Path
) -> None:
    run_students_commands([sys.executable, "-c", ALONE], make_artifact(tiny_teacher, saved_data, tmp_path), saved_data)


def test_extract_without_its_extra_says_which_one(saved_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, "extract", "--teacher", "x", "--dataset", str(saved_data)]
    command += ["--out", str(tmp_path / "x.h5")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: extract needs transformers, which is not installed: pip install 'clip-embed-kd[extract]'"
    )


def test_the_public_names_of_the_store_are_these() -> None:
    assert sorted(store.__all__) == [
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


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"cli.py", "pipeline", "store"}
    assert "pipeline/distill/recipes/paper.toml" in names
    assert "pipeline/distill/model_card.md" in names
    assert "pipeline/demo/digits-vit/model.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_an_installation_without_extras_is_a_students_machine(
    tiny_teacher: Path, saved_data: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "timm" in listed
    assert "transformers" not in listed
    # From another folder: the installed package is what runs.
    command = [str(python), "-c", ALONE.replace("sys.modules[name] = None", "pass")]
    run_students_commands(command, make_artifact(tiny_teacher, saved_data, tmp_path), saved_data, folder=tmp_path)
    shutil.rmtree(tmp_path / "venv")  # gigabytes


def run_students_commands(command: list[str], artifact: Path, data: Path, folder: Path = ROOT) -> None:
    student = artifact.parent / "run"
    train = ["--dataset", str(data), "--out", str(student), "--student", "test_resnet", "--epochs", "2"]
    for arguments in (
        ["store", "inspect", str(artifact)],
        ["distill", "--artifact", str(artifact), "--target", "both", *train],
        ["evaluate", "--student", str(student), "--dataset", str(data)],
    ):
        environment = {**os.environ, "PYTHONPATH": "" if folder != ROOT else str(ROOT)}
        done = subprocess.run(
            [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def make_artifact(teacher: Path, data: Path, folder: Path) -> Path:
    from pipeline.data import DataSettings
    from pipeline.extract import ExtractSettings, extract

    settings = DataSettings(dataset=str(data))
    return extract(
        ExtractSettings(teacher=str(teacher), data=settings, out=folder / "tiny.safetensors", samples=True)
    ).path


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))
