"""Run the main job on CIFAR-100 with a real teacher, through the commands, and print what it took.

    python benchmarks/main_job.py --work runs/main-job

It needs a folder with `data/cifar100` and `teachers/`, by default ../shared; CLIP_EMBED_KD_SHARED names another.
Beside figures it checks what must hold on real data: the same command gives the same bytes, both containers hold
the same tensors to the bit, and class means equal an independent computation with transformers.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import datasets
import h5py
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CLIP_EMBED_KD_SHARED", ROOT.parent / "shared"))
DATA = ["--dataset", str(SHARED / "data" / "cifar100"), "--label-column", "fine_label"]
FEW = 20  # images a class of the comparison in float32


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for artifacts and runs")
@click.option("--teacher", default="vit_tiny_patch16_224", show_default=True, help="folder under teachers/")
@click.option("--epochs", default=1, show_default=True, help="of the student")
def main(work: Path, teacher: str, epochs: int) -> None:
    """Extract twice into each container, compare, distil, evaluate; write WORK/main_job.json."""
    work.mkdir(parents=True, exist_ok=True)
    folder = SHARED / "teachers" / teacher
    extract = ["extract", "--teacher", str(folder), *DATA, "--overwrite"]
    hundred = [*extract, "--per-class", "100"]
    figures: dict[str, Any] = {}
    for suffix in ("safetensors", "h5"):
        figures[f"extract .{suffix}"] = run(*hundred, "--out", str(work / f"{teacher}.{suffix}"))
    again = run(*hundred, "--out", str(work / "again.safetensors"))
    figures["same command, same bytes"] = same_bytes(work / f"{teacher}.safetensors", work / "again.safetensors")
    figures["safetensors and h5 equal to the bit"] = same_tensors(
        work / f"{teacher}.safetensors", work / f"{teacher}.h5"
    )
    figures["extract again"] = again
    few = ["--per-class", str(FEW), "--precision", "float32", "--out", str(work / "float32.safetensors")]
    exact = run(*extract, *few)
    figures["extract in float32"] = exact
    figures["largest relative error of a class mean (float32)"] = mean_error(folder, work / "float32.safetensors")
    out = work / "run"
    artifact = ["--artifact", str(work / f"{teacher}.safetensors")]
    figures["distill"] = run("distill", *artifact, *DATA, "--out", str(out), "--epochs", str(epochs), "--overwrite")
    figures["evaluate"] = run("evaluate", "--student", str(out), *DATA)
    del figures["evaluate"]["per_class"]
    (work / "main_job.json").write_text(json.dumps(figures, indent=2))
    click.echo(json.dumps(figures, indent=2))


def run(*arguments: str) -> dict[str, Any]:
    """Run one command of the project and return its JSON."""
    click.echo("$ clip-embed-kd " + " ".join(arguments), err=True)
    command = [sys.executable, str(ROOT / "cli.py"), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def same_bytes(left: Path, right: Path) -> bool:
    """Tell whether two files are equal."""
    return left.read_bytes() == right.read_bytes()


def same_tensors(left: Path, right: Path) -> bool:
    """Compare an artifact in both containers, read with the official libraries."""
    expected = load_file(left)
    with h5py.File(right) as file:
        names = {f"{group}/{leaf}" for group in file for leaf in file[group]}
        return names == set(expected) and all(
            (tensor.dtype, tensor.shape, tensor.tobytes())
            == (file[name].dtype, file[name].shape, file[name][...].tobytes())
            for name, tensor in expected.items()
        )


def mean_error(folder: Path, artifact: Path) -> float:
    """Recompute the class means with transformers alone.

    Returns:
        The largest relative error ‖mean − reference‖ / ‖reference‖ over all classes.
    """
    means = load_file(artifact)["class/mean"]
    split = datasets.load_dataset(DATA[1], split="train")
    labels, names = np.array(split["fine_label"]), split.features["fine_label"].names
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    errors = []
    for index in range(len(names)):
        # The documented choice: each class draws from a random stream of its own, by its name.
        stream = hashlib.blake2b(names[index].encode(), digest_size=8).digest()
        random = np.random.default_rng([0, int.from_bytes(stream, "little")])
        rows = random.choice(np.flatnonzero(labels == index), FEW, replace=False)
        reference = embed(model, processor, [image.convert("RGB") for image in split[rows.tolist()]["img"]]).mean(
            axis=0
        )
        errors.append(float(np.linalg.norm(means[index] - reference) / np.linalg.norm(reference)))
    return max(errors)


def embed(model: Any, processor: Any, images: list[Any]) -> NDArray[np.float64]:
    """Return [CLS] after the last norm, or the pooled output where the model has no token sequence."""
    with torch.inference_mode():
        output = model(**processor(images, return_tensors="pt"))
    hidden = output.last_hidden_state
    pooled = hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)
    values: NDArray[np.float64] = pooled.double().numpy()
    return values


if __name__ == "__main__":
    main()
