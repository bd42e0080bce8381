"""A student as an ONNX model in memory: made by PyTorch's exporter, and run by onnxruntime for comparison.

The model takes 8-bit pixels; mean and standard deviation are in it. Nothing is quantized, and nothing is made for one
kind of device. `pipeline/distill/export.py` makes a file of it.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.distill.attention import ExplicitAttention
from pipeline.distill.student import Student
from pipeline.runtime import software_versions

# The exporter's operators are written for this opset, so none is converted. With this file version onnxruntime 1.14
# (2023) and all newer ones read it, on phones and single-board computers too; 1.15 and 1.32 were tried.
OPSET, _IR_VERSION = 18, 8
_BATCH_SIZES = (1, 2, 5)
NUM_COMPARED = sum(_BATCH_SIZES)


@dataclass(frozen=True)
class Gap:
    """Largest difference between onnxruntime and PyTorch in float32, and largest value, of one output."""

    difference: float
    scale: float


class _Deployed(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, pixels: UInt8[Tensor, "batch size size 3"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch student_dim"]]:
        embedding, logits = self.student(self.student.normalise(pixels))
        return logits, embedding


def encode_onnx(student: Student, metadata: Mapping[str, Any]) -> bytes:
    """Make an ONNX model of a student.

    Input `pixels`, uint8 [batch, size, size, 3] in RGB; outputs `logits`, float32 [batch, classes], and `embedding`,
    float32 [batch, student_dim]. The same student gives the same bytes, with the same versions.

    Args:
        student: on the CPU, in evaluation mode; left as it is.
        metadata: each value is written as JSON.

    Returns:
        The whole model, weights included.

    Raises:
        Exception: the exporter cannot express this model; of whatever kind it is.
    """
    side = student.config.image_size
    # The exporter cannot take apart every fused attention.
    with _quiet(), ExplicitAttention(student, torch.device("cpu")):
        program = torch.onnx.export(
            _Deployed(student).eval(),
            (torch.zeros(2, side, side, 3, dtype=torch.uint8),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits", "embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    model: Any = program.model_proto  # type: ignore[union-attr]
    _forget_source(model.graph)
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "clip-embed-kd", software_versions(())["clip-embed-kd"]
    model.doc_string = (
        f"Image classifier. pixels: uint8 [batch, {side}, {side}, 3], made of an image as metadata `preprocessing` "
        "says; logits [batch, classes], in the order of metadata `class_names`; embedding [batch, student_dim]."
    )
    for name in sorted(metadata):
        model.metadata_props.add(key=name, value=json.dumps(metadata[name], sort_keys=True))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def compare_onnx(content: bytes, student: Student) -> dict[str, Gap]:
    """Run an ONNX model and its student on random images, in several batches of different sizes.

    Args:
        content: what `encode_onnx` returned.
        student: what it was made of.

    Returns:
        For `logits` and `embedding`, how far they are apart; NaN where one of the two is not finite.

    Raises:
        Exception: the model is not valid, or onnxruntime cannot run it.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(content, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random, side = np.random.default_rng(0), student.config.image_size
    expected: dict[str, list[NDArray[np.float32]]] = {"logits": [], "embedding": []}
    found: dict[str, list[NDArray[np.float32]]] = {"logits": [], "embedding": []}
    for batch_size in _BATCH_SIZES:
        pixels = random.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
        with torch.inference_mode():
            embedding, logits = student(student.normalise(torch.from_numpy(pixels)))
        expected["logits"].append(logits.numpy())
        expected["embedding"].append(embedding.numpy())
        for name, values in zip(found, session.run(list(found), {"pixels": pixels}), strict=True):
            found[name].append(values)
    return {name: _gap(np.concatenate(expected[name]), np.concatenate(found[name])) for name in expected}


def _gap(expected: NDArray[np.float32], found: NDArray[np.float32]) -> Gap:
    with np.errstate(invalid="ignore"):
        return Gap(float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def _forget_source(graph: Any) -> None:
    # The exporter writes down which line of which file on this machine each node came from.
    graph.ClearField("value_info")
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_source(attribute.g)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
