import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _builder
from torch import Tensor

from pipeline.distill.initial import initialise
from pipeline.distill.student import Student, save_student
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import equal_weights, make_student, weights_of

CLASSIFIERS = {"test_resnet": "fc", "test_vit": "head", "base": "head", "test_efficientnet": "classifier"}


def refusal(student: Student, init: object) -> str:
    before = weights_of(student)
    with pytest.raises(PipelineError) as caught:
        initialise(student, str(init))
    assert equal_weights(weights_of(student), before)
    message = str(caught.value)
    assert "\n" not in message
    return message


def keep(student: Student, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_student(student, folder / "student")
    return folder


def split(student: Student, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the body and of the classifier."""
    prefix = CLASSIFIERS[name] + "."
    weights = weights_of(student)
    return (
        {key: tensor for key, tensor in weights.items() if not key.startswith(prefix)},
        {key: tensor for key, tensor in weights.items() if key.startswith(prefix)},
    )


def test_from_scratch_nothing_changes() -> None:
    student = make_student()
    before = weights_of(student)
    assert initialise(student, "scratch") is None
    assert equal_weights(weights_of(student), before)


# A folder


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    found = {initialise(make_student(), str(keep(make_student(seed=seed), tmp_path / str(seed)))) for seed in (1, 1, 2)}
    assert len(found) == 2
    assert all(digest is not None and re.fullmatch("[0-9a-f]{64}", digest) for digest in found)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_student_of_the_same_classes_is_taken_over_whole(name: str, tmp_path: Path) -> None:
    earlier, student = make_student(name, 32, seed=1), make_student(name, 32)
    folder = keep(earlier, tmp_path / "run")
    assert not equal_weights(weights_of(student), weights_of(earlier))
    digest = initialise(student, str(folder))
    assert equal_weights(weights_of(student), weights_of(earlier))
    again = make_student(name, 32)
    assert initialise(again, str(folder / "student")) == digest
    assert equal_weights(weights_of(again), weights_of(earlier))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("names", [("ant", "bee"), ("bee", "ant", "cat"), tuple("uvwxyz")])
def test_of_a_student_of_other_classes_all_but_the_classifier_is_taken(
    names: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    earlier, student = make_student(name, 32, names, seed=1), make_student(name, 32)
    _, classifier = split(student, name)
    initialise(student, str(keep(earlier, tmp_path / "run")))
    body, kept = split(student, name)
    assert len(classifier) == 2
    assert equal_weights(kept, classifier)
    assert equal_weights(body, split(earlier, name)[0])


def test_a_folder_that_names_no_classes_gives_no_classifier(tmp_path: Path) -> None:
    earlier, student = make_student(seed=1), make_student()
    folder = keep(earlier, tmp_path / "run") / "student"
    _, classifier = split(student, "test_resnet")
    for change in ("remove the names", "remove the file"):
        path = folder / "config.json"
        if change == "remove the names":
            document = json.loads(path.read_text("utf-8"))
            del document["label_names"]
            path.write_text(json.dumps(document))
        else:
            path.unlink()
        initialise(student, str(folder))
        assert equal_weights(split(student, "test_resnet")[1], classifier)
        assert equal_weights(split(student, "test_resnet")[0], split(earlier, "test_resnet")[0])


def test_a_headless_timm_model_gives_its_body(tmp_path: Path) -> None:
    body, _ = split(make_student(seed=1), "test_resnet")
    save_file(body, tmp_path / "model.safetensors")
    student = make_student()
    _, classifier = split(student, "test_resnet")
    initialise(student, str(tmp_path))
    assert equal_weights(split(student, "test_resnet")[0], body)
    assert equal_weights(split(student, "test_resnet")[1], classifier)


@pytest.mark.parametrize(("name", "before", "after"), [("test_vit", 64, 32), ("base", 16, 32)])
def test_embeddings_of_positions_are_resized_to_another_image_size(
    name: str, before: int, after: int, tmp_path: Path
) -> None:
    earlier, student = make_student(name, before, seed=1), make_student(name, after)
    shape = weights_of(student)["pos_embed"].shape
    initialise(student, str(keep(earlier, tmp_path / "run")))
    found, expected = weights_of(student), weights_of(earlier)
    assert found["pos_embed"].shape == shape != expected["pos_embed"].shape
    assert torch.equal(found["pos_embed"][:, 0], expected["pos_embed"][:, 0])  # of the class token
    spread, before_spread = found["pos_embed"][:, 1:].mean(dim=1), expected["pos_embed"][:, 1:].mean(dim=1)
    assert torch.allclose(spread, before_spread, atol=0.01)
    del found["pos_embed"], expected["pos_embed"]
    assert equal_weights(found, expected)


def test_a_student_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = keep(make_student("test_resnet", 8), tmp_path / "run")
    assert refusal(make_student("test_vit", 16), folder) == (
        f"{folder}: lacks 78 of the weights of student test_vit (blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, "
        "blocks.0.attn.qkv.bias, blocks.0.attn.qkv.weight, blocks.0.mlp.fc1.bias, …). Is it a model of the same "
        "architecture? Pass the --student that it is."
    )


def test_a_student_that_has_more_weights_is_refused(tmp_path: Path) -> None:
    earlier = weights_of(make_student())
    save_file(earlier | {"another.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": list(CLASS_NAMES)}))
    message = refusal(make_student(), tmp_path)
    assert message.startswith(f"student test_resnet: the weights of --init {tmp_path} cannot be taken (Error(s) in ")


def test_a_student_of_another_width_is_refused(tmp_path: Path) -> None:
    weights = weights_of(make_student())
    name = "layer4.0.conv2.weight"
    assert name in weights
    save_file(weights | {name: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    message = refusal(make_student(), tmp_path)
    assert message.startswith(f"student test_resnet: the weights of --init {tmp_path} cannot be taken (Error(s) in ")


@pytest.mark.parametrize("init", ["nothing", "pretrainde", "file"])
def test_a_folder_without_weights_is_refused(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert refusal(make_student(), init) == (
        f"--init {init}: no model.safetensors there. Pass scratch, pretrained, a run directory or a folder of a timm "
        "model."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80\x02}q\x00."),  # a pickle
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", b"[" * 100_000),
    ],
)
def test_a_damaged_folder_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    folder = keep(make_student(seed=1), tmp_path / "run") / "student"
    (folder / name).write_bytes(content)
    message = refusal(make_student(), folder)
    assert message.startswith(f"--init {folder}: is damaged (")
    assert message.endswith(").")


def test_pickled_weights_are_not_looked_for(tmp_path: Path) -> None:
    torch.save(make_student().model.state_dict(), tmp_path / "pytorch_model.bin")
    assert refusal(make_student(), tmp_path).startswith(f"--init {tmp_path}: no model.safetensors there.")


# From the hub


def test_there_are_no_pretrained_weights_of_the_papers_students() -> None:
    assert refusal(make_student("base", 32), "pretrained") == (
        "student vit_tiny_patch16_224: there are no pretrained weights of it. Pass --init scratch, or a folder."
    )


def test_a_model_without_pretrained_weights_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student()
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    assert refusal(student, "pretrained") == (
        "student test_resnet: there are no pretrained weights of it. Pass --init scratch, or a folder."
    )


def test_weights_that_cannot_be_fetched_are_one_line() -> None:
    message = refusal(make_student(), "pretrained")  # no test may reach a network
    assert message.startswith("student test_resnet: the weights of --init pretrained cannot be taken (")
    assert message.endswith(").")
    assert len(message) < 300


def test_pretrained_weights_are_taken_all_but_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    weights = timm.create_model("test_resnet", num_classes=1000).state_dict()
    asked: list[str] = []

    def fetch(model_id: str, **options: Any) -> dict[str, Tensor]:
        asked.append(model_id)
        return dict(weights)

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", fetch)
    student = make_student()
    _, classifier = split(student, "test_resnet")
    initialise(student, "pretrained")
    assert asked == ["timm/test_resnet.r160_in1k"]
    body, kept = split(student, "test_resnet")
    assert equal_weights(kept, classifier)
    assert equal_weights(body, {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")})


def test_a_student_that_was_given_weights_is_saved_with_them(tmp_path: Path) -> None:
    earlier, student = make_student(seed=1), make_student()
    initialise(student, str(keep(earlier, tmp_path / "run")))
    save_student(student, tmp_path / "again")
    assert equal_weights(load_file(tmp_path / "again" / "model.safetensors"), weights_of(earlier))
