"""A trained student opened by timm, by transformers and by onnxruntime: its logits beside this program's own."""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.distill_setup import Setup, first_rows
from benchmarks.extract_processes import run
from benchmarks.extract_setup import ROOT
from benchmarks.figure_book import Figures
from pipeline.distill.images import fit_to
from pipeline.distill.student import load_student
from pipeline.pixels import to_rgb

TRAINED_IMAGES, TEST_IMAGES, COMPARED_IMAGES = 1000, 200, 32
SHORT, SHORTER = ("--max-steps", "100"), ("--max-steps", "2", "--image-size", "16")
SIZES_PX = {"32×32": (32, 32), "50×37": (50, 37), "224×300": (224, 300)}  # width, height
MOST_OFF = {"timm": 0.0, "transformers": 0.0, "onnxruntime": 1e-4}
Logits = NDArray[np.float32]


def measure_opens(setup: Setup) -> Figures:
    """Train a student for a moment, open it three ways, and give each the same uint8 images of several sizes.

    Each route prepares images as it does by itself; onnxruntime, which prepares nothing, gets what our resize makes.
    """
    subject = setup.subject("class", setup.subset(TRAINED_IMAGES, TEST_IMAGES))
    folder = setup.work / "opened"
    run(setup.distill(subject, folder, "--overwrite", *setup.pick(SHORT, SHORTER)))
    routes: dict[str, Callable[[Path, Sequence[Image.Image]], Logits]] = {
        "timm": timm_logits,
        "transformers": transformers_logits,
    }
    figures: Figures = {"images of each size": COMPARED_IMAGES, "largest difference of a logit": {}, "checks": {}}
    if reason := why_not_exported(folder):
        figures["onnxruntime"] = f"not available: {reason}"
    else:
        routes["onnxruntime"] = onnx_logits
    images = [to_rgb(image) for image in first_rows("test", COMPARED_IMAGES)["img"]]
    for name, route in routes.items():
        off = {}
        for size, size_px in SIZES_PX.items():
            resized = [image.resize(size_px, Image.Resampling.BICUBIC) for image in images]
            off[size] = float(np.abs(route(folder, resized) - our_logits(folder, resized)).max())
        figures["largest difference of a logit"][name] = off
        figures["checks"][f"{name}: at most {MOST_OFF[name]:g}"] = max(off.values()) <= MOST_OFF[name]
    return figures


def our_logits(run_directory: Path, images: Sequence[Image.Image]) -> Logits:
    """Return [N, C] logits of this program."""
    student = load_student(run_directory)
    pixels = torch.from_numpy(_fitted(run_directory, images))
    with torch.inference_mode():
        return student(student.normalise(pixels))[1].numpy()  # type: ignore[no-any-return]


def timm_logits(run_directory: Path, images: Sequence[Image.Image]) -> Logits:
    """Return [N, C] logits of timm, images prepared by timm's transform."""
    model = timm.create_model(f"local-dir:{run_directory / 'student'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(image) for image in images])).numpy()  # type: ignore[no-any-return]


def transformers_logits(run_directory: Path, images: Sequence[Image.Image]) -> Logits:
    """Return [N, C] logits of transformers, images prepared by its image processor."""
    folder = run_directory / "student"
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**processor(list(images), return_tensors="pt")).logits.numpy()  # type: ignore[no-any-return]


def onnx_logits(run_directory: Path, images: Sequence[Image.Image]) -> Logits:
    """Return [N, C] logits of onnxruntime; division by 255, mean and deviation are in the model."""
    session = importlib.import_module("onnxruntime").InferenceSession(_onnx(run_directory))
    found: Logits = session.run(["logits"], {"pixels": _fitted(run_directory, images)})[0]
    return found


def why_not_exported(run_directory: Path) -> str | None:
    """Export a student as ONNX; where this program or this machine cannot, say why.

    Raises:
        CalledProcessError: it can, and failed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    out = _onnx(run_directory)
    out.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "cli.py"), "export", "--student", str(run_directory), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode == 2:  # wrong usage
        return "this version has no such command"
    done.check_returncode()
    return None


def _fitted(run_directory: Path, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    fit = fit_to(load_student(run_directory).config.image_size)
    return np.stack([np.asarray(fit(image)) for image in images])


def _onnx(run_directory: Path) -> Path:
    return run_directory.with_name("opened.onnx")
