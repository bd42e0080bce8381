"""A student as one ONNX file, which appears only when onnxruntime computes with it what PyTorch computes.

How an image is resized, the class names and where the student comes from stand in the file's metadata.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.distill.onnx_model import NUM_COMPARED, OPSET, compare_onnx, encode_onnx
from pipeline.distill.provenance import read_record, recorded
from pipeline.distill.student import Student, load_student
from pipeline.errors import PipelineError, first_line
from pipeline.output import check_output, write_output
from pipeline.progress import LOGGER, size
from pipeline.runtime import software_versions

TOLERANCE = 1e-4  # largest difference from PyTorch, of an output's largest value where that is above 1
_MAX_WEIGHT_BYTES = 2**31 - 2**20  # in one protobuf message, less what is no weight
_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how far its logits were from PyTorch's on random images."""

    path: Path
    model_bytes: int
    opset: int
    image_size: int
    num_classes: int
    embed_dim: int
    num_compared: int
    max_difference: float
    max_logit: float


def export_student(folder: Path, out: Path, *, overwrite: bool = False) -> ExportResult:
    """Write a student as one ONNX file.

    The same student gives the same bytes, with the same versions.

    Args:
        folder: a run directory, or the `student` folder in it.
        out: the file to make, `.onnx`.
        overwrite: replace an existing file.

    Returns:
        What was written.

    Raises:
        PipelineError: no student, no place for the file, the extra `export` is not installed, the student cannot be
            exported, or onnxruntime computes something else; nothing is left behind.
    """
    _check_out(out, overwrite)
    _require_libraries()
    student, record = load_student(folder), read_record(folder)
    weight_bytes = sum(tensor.nbytes for tensor in student.model.state_dict().values())
    if weight_bytes > _MAX_WEIGHT_BYTES:
        raise PipelineError(
            f"{folder}: the student has {size(weight_bytes)} of weights, one ONNX file holds "
            f"{size(_MAX_WEIGHT_BYTES)}. Train a smaller student."
        )
    check_output(out, weight_bytes + 10_000_000, replaceable=overwrite)
    LOGGER.info("Exporting %s: seconds for most models, minutes for some.", student.config.architecture)
    content, difference, scale = _encode(folder, student, _metadata(student, record))
    write_output(out, content)
    return ExportResult(
        path=out,
        model_bytes=len(content),
        opset=OPSET,
        image_size=student.config.image_size,
        num_classes=len(student.config.class_names),
        embed_dim=student.embed_dim,
        num_compared=NUM_COMPARED,
        max_difference=difference,
        max_logit=scale,
    )


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix != ".onnx":
        raise PipelineError(f"{out}: the name of an ONNX file ends in .onnx, found {out.suffix!r}.")
    if out.is_dir():
        raise PipelineError(f"{out}: is a folder. Choose another --out.")
    check_output(out, 0, replaceable=overwrite)


def _require_libraries() -> None:
    try:
        for library in _LIBRARIES:
            importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"export needs {error.name}, which is not installed: pip install 'clip-embed-kd[export]'"
        ) from None


def _metadata(student: Student, record: Any) -> dict[str, Any]:
    config = student.config
    metadata = {
        "architecture": config.architecture,
        "class_names": config.class_names,
        "preprocessing": {
            "colour": "RGB",
            "resize_shorter_side": config.image_size,
            "interpolation": "bicubic",
            "antialias": True,
            "centre_crop": config.image_size,
            "inside_the_model": {"divide_by": 255, "mean": config.mean, "std": config.std},
        },
        "software": software_versions(("torch", "timm", "onnx", "onnxscript")),
    }
    if record is not None:
        metadata["artifact"] = recorded(record, "artifact")
        metadata["data"] = {name: recorded(record, "data", name) for name in ("name", "revision", "licence")}
        metadata["accuracy"] = {name: recorded(record, "result", name) for name in ("top1", "top5")}
    return metadata


def _encode(folder: Path, student: Student, metadata: dict[str, Any]) -> tuple[bytes, float, float]:
    """Return the model, and largest difference and largest value of its logits."""
    try:
        content = encode_onnx(student, metadata)
        gaps = compare_onnx(content, student)
    except Exception as error:  # of three libraries and any model of timm
        raise PipelineError(f"{folder}: cannot be exported to ONNX ({_reason(error)}). Nothing was written.") from error
    for name, gap in gaps.items():
        if not gap.difference <= TOLERANCE * max(1.0, gap.scale):  # NaN is refused too
            raise PipelineError(
                f"{folder}: onnxruntime and PyTorch differ by {gap.difference:.1e} in {name} of up to {gap.scale:.1e}; "
                f"{TOLERANCE:g} of that, or of 1, is allowed. Nothing was written."
            )
    return content, gaps["logits"].difference, gaps["logits"].scale


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter wraps what happened in pages of advice
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"[:200]
