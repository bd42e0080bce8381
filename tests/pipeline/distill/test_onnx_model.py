import copy
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pipeline.distill.onnx_model import OPSET, _forget_source, compare_onnx, encode_onnx
from pipeline.distill.student import Student
from tests.pipeline.distill.examples import make_student

METADATA = {"b": ["猫", "\ud800", 'a "b"'], "a": {"mean": (0.5, 1e-17)}}


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("test_resnet", 8)


@pytest.fixture(scope="module")
def content(student: Student) -> bytes:
    return encode_onnx(student, METADATA)


def pytorch_outputs(student: Student, pixels: Any) -> list[Any]:
    with torch.no_grad():
        embedding, logits = student(student.normalise(torch.from_numpy(pixels)))
    return [logits.numpy(), embedding.numpy()]


# What the model is


def test_it_takes_pixels_in_batches_of_any_size(student: Student, content: bytes) -> None:
    session = onnxruntime.InferenceSession(content)
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", 8, 8, 3])
    found = [(output.name, output.type, output.shape) for output in session.get_outputs()]
    assert found == [("logits", "tensor(float)", ["batch", 3]), ("embedding", "tensor(float)", ["batch", 96])]
    for batch_size in (1, 7):
        image = np.random.default_rng(1).integers(0, 256, (batch_size, 8, 8, 3), dtype=np.uint8)
        for expected, values in zip(pytorch_outputs(student, image), session.run(None, {"pixels": image}), strict=True):
            assert values.shape == expected.shape
            assert np.abs(values - expected).max() < 1e-5


def test_it_is_one_valid_file_of_a_version_that_older_runtimes_read(content: bytes) -> None:
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)] == [("", 18)]
    assert {tensor.data_location for tensor in model.graph.initializer} == {TensorProto.DEFAULT}
    assert model.producer_name == "clip-embed-kd"


def test_every_value_of_the_metadata_is_json(content: bytes) -> None:
    found = onnxruntime.InferenceSession(content).get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in found.items()} == {
        "a": {"mean": [0.5, 1e-17]},
        "b": ["猫", "\ud800", 'a "b"'],
    }


def test_the_same_student_gives_the_same_bytes_and_nothing_is_printed(
    student: Student, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert encode_onnx(student, dict(reversed(METADATA.items()))) == content
    compare_onnx(content, student)
    assert capfd.readouterr() == ("", "")


def test_nothing_says_where_it_was_made(content: bytes) -> None:
    assert b".py" not in content
    assert b"torch.onnx" not in content
    assert b"site-packages" not in content


def test_where_nested_graphs_were_made_is_forgotten_too() -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"], doc_string="a.py")], "inner", [], [])
    node = helper.make_node("If", ["x"], ["z"], doc_string="b.py", then_branch=inner, else_branch=inner)
    value = helper.make_tensor_value_info("x", TensorProto.BOOL, [], doc_string="c.py")
    graph = helper.make_graph([node], "outer", [value], [], doc_string="d.py", value_info=[value])
    graph.node[0].metadata_props.add(key="from", value="e.py")
    _forget_source(graph)
    assert b".py" not in graph.SerializeToString()
    assert [node.op_type for node in graph.node[0].attribute[0].g.node] == ["Identity"]


# How far it is from the student


def test_it_is_near_its_student(student: Student, content: bytes) -> None:
    gaps = compare_onnx(content, student)
    assert list(gaps) == ["logits", "embedding"]
    assert all(gap.difference < 1e-5 * max(1, gap.scale) for gap in gaps.values())


def test_a_difference_is_measured(student: Student, content: bytes) -> None:
    shifted = copy.deepcopy(student)
    with torch.no_grad():
        shifted.classifier.bias[1] -= 100.0
    gaps = compare_onnx(content, shifted)
    assert gaps["logits"].difference == pytest.approx(100, rel=1e-4)
    assert gaps["logits"].scale == pytest.approx(100, rel=1e-2)
    assert gaps["embedding"].difference < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_differ_from_everything(value: float, student: Student, content: bytes) -> None:
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.classifier.bias[0] = value
    difference = compare_onnx(content, broken)["logits"].difference
    assert not difference <= 1e9


def test_what_is_no_model_is_refused(student: Student, content: bytes) -> None:
    with pytest.raises(ValueError, match="Unable to parse"):
        compare_onnx(content[:1000], student)


# Models of all kinds


class Undecided(nn.Module):
    """Which way it computes depends on the pixels."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        if pixels.sum() > 0:
            return pixels.mean(dim=(2, 3))
        return pixels.amax(dim=(2, 3))

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features


@pytest.mark.slow
def test_a_model_whose_course_depends_on_the_pixels_cannot_be_encoded(
    student: Student, capfd: pytest.CaptureFixture[str]
) -> None:
    undecided = Undecided()
    undecided.get_classifier = lambda: nn.Linear(3, 3)  # type: ignore[assignment]
    with pytest.raises(Exception, match=r"Failed to export the model"):
        encode_onnx(Student(undecided, student.config), {})
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("base", 32),
        ("large", 32),
        ("resnet18", 32),
        ("mobilenetv4_conv_small", 32),
        ("test_vit_relpos", 160),  # its fused attention alone cannot be taken apart
        ("test_maxvit", 160),
        ("test_efficientnet_evos", 64),
    ],
)
def test_students_of_many_kinds_are_encoded(name: str, image_size: int) -> None:
    student = make_student(name, image_size)
    before = [getattr(layer, "fused_attn", None) for layer in student.modules()]
    for gap in compare_onnx(encode_onnx(student, {}), student).values():
        assert gap.difference <= 1e-4 * max(1.0, gap.scale)
    assert [getattr(layer, "fused_attn", None) for layer in student.modules()] == before
