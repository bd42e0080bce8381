from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.data import DataSettings, load_labelled
from pipeline.distill import evaluate as evaluation
from pipeline.distill.config import EvaluateSettings
from pipeline.distill.evaluate import Evaluation, evaluate_run, evaluate_student, learned_labels
from pipeline.distill.images import DecodedImages
from pipeline.distill.student import Student, StudentConfig, save_student
from pipeline.errors import PipelineError
from pipeline.runtime import Precision
from tests.conftest import CLASS_NAMES, make_images, make_split
from tests.pipeline.distill.examples import labelled, make_rows, make_student

CPU = torch.device("cpu")
SEVEN = ("ant", "bee", "cat", "dog", "eel", "fly", "gnu")


class Recited(nn.Module):
    """Answers image i, whose red value is i, with row i of a table."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        num_classes = answers.shape[1]
        self.answers = answers
        self.head = nn.Linear(num_classes, num_classes, bias=False)
        nn.init.eye_(self.head.weight)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward_features(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0, 0, 0]

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return self.answers[features.round().long()]


def recite(rankings: Sequence[str], class_names: tuple[str, ...] = SEVEN) -> Student:
    """Make a student that ranks the classes, named by their first letters, so for each image."""
    answers = torch.zeros(len(rankings), len(class_names))
    for row, ranking in enumerate(rankings):
        for place, letter in enumerate(ranking):
            answers[row, [name[0] for name in class_names].index(letter)] = len(ranking) - place
    grey = (1 / 255,) * 3  # a red value of i stays i
    return Student(Recited(answers), StudentConfig("test_resnet", {}, 1, (0.0,) * 3, grey, class_names))


def images_of(labels: Sequence[int]) -> DecodedImages:
    pixels = np.zeros((len(labels), 1, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0, 0] = np.arange(len(labels))
    numbers = np.arange(len(labels))
    return DecodedImages(pixels, numbers, numbers, np.zeros((len(labels), 16), np.uint8), np.array(labels, np.int64))


RANKINGS = ("abcdefg", "bacdefg", "gfedcba", "cabdefg", "cdabefg", "fgabcde", "dabcefg", "gabcdef")
# The label's place in its ranking: 1, 2, 7, 1, 3, 6, 1, 5.
LABELS = (0, 0, 0, 2, 0, 3, 3, 3)


def counted(batch_size: int = 256, precision: torch.dtype = torch.float32) -> Evaluation:
    return evaluate_student(recite(RANKINGS), images_of(LABELS), CPU, precision, batch_size)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracies_are_those_counted_by_hand(batch_size: int, precision: torch.dtype) -> None:
    found = counted(batch_size, precision)
    assert found.top1 == 100 * 3 / 8
    assert found.top5 == 100 * 6 / 8
    assert found.correct.tolist() == [1, 0, 1, 1, 0, 0, 0]
    assert found.count.tolist() == [4, 0, 1, 3, 0, 0, 0]
    assert found.predicted.tolist() == [0, 1, 6, 2, 2, 5, 3, 6]
    assert found.class_names == SEVEN
    assert found.images_per_second == pytest.approx(8 / found.seconds)


def test_only_classes_with_images_are_listed() -> None:
    assert counted().per_class() == {
        "ant": {"num_images": 4, "top1": 25.0},
        "cat": {"num_images": 1, "top1": 100.0},
        "dog": {"num_images": 3, "top1": pytest.approx(100 / 3)},
    }


def test_the_worst_classes_come_first() -> None:
    assert counted().worst() == [("ant", 25.0), ("dog", pytest.approx(100 / 3)), ("cat", 100.0)]


def test_no_more_than_five_classes_are_the_worst() -> None:
    found = evaluate_student(recite(["abcdefg"] * 7), images_of(range(7)), CPU, torch.float32, 64)
    assert found.worst() == [("bee", 0.0), ("cat", 0.0), ("dog", 0.0), ("eel", 0.0), ("fly", 0.0)]


def test_every_answer_is_in_the_top_five_of_fewer_than_five_classes() -> None:
    student = recite(["abc", "bca", "cab"], CLASS_NAMES)
    found = evaluate_student(student, images_of([0, 0, 0]), CPU, torch.float32, 64)
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == 100


@pytest.mark.parametrize("training", [True, False])
def test_the_students_mode_stays_even_after_an_error(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student = recite(RANKINGS).train(training)
    evaluate_student(student, images_of(LABELS), CPU, torch.float32, 64)
    assert student.training == training
    monkeypatch.setattr(student, "normalise", lambda pixels: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception, match=r"^stopped$"):
        evaluate_student(student, images_of(LABELS), CPU, torch.float32, 64)
    assert student.training == training


def test_selected_images_are_evaluated() -> None:
    chosen = images_of(LABELS).select(np.array([6, 0, 3]))
    found = evaluate_student(recite(RANKINGS), chosen, CPU, torch.float32, 64)
    assert found.top1 == 100
    assert found.count.sum() == 3


def test_the_clean_view_is_evaluated() -> None:
    images = images_of(LABELS)
    views = np.concatenate([images.pixels, images.pixels[::-1]], axis=1)
    found = evaluate_student(recite(RANKINGS), replace(images, pixels=views), CPU, torch.float32, 64)
    assert found.correct.tolist() == counted().correct.tolist()


@pytest.mark.parametrize("training", [False, True])
def test_a_student_is_evaluated_in_evaluation_mode_and_left_as_it_was(training: bool) -> None:
    student = make_student("test_resnet", 8).train(training)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes: list[bool] = []
    student.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    pixels = np.stack([np.array(image) for image in make_images(4, 0)])[:, None]
    numbers = np.arange(4)
    images = DecodedImages(pixels, numbers, numbers, np.zeros((4, 16), np.uint8), numbers % 3)
    evaluate_student(student, images, CPU, torch.float32, 64)
    assert modes == [False]
    assert student.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_embeddings_of_images_from_everywhere_are_kept(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counted(batch_size)
    assert whole.embedded.tolist() == list(range(8))
    assert whole.embeddings.dtype == np.float32
    assert (whole.embeddings.argmax(axis=1) == whole.predicted).all()  # of what is recited, the logits
    monkeypatch.setattr(evaluation, "MAX_EMBEDDED", 3)
    few = counted(batch_size)
    assert few.embedded.tolist() == [0, 3, 7]
    assert few.embeddings.tolist() == whole.embeddings[few.embedded].tolist()
    assert few.predicted.tolist() == whole.predicted.tolist()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_embeddings_are_held_without_the_tokens_that_they_stood_among(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Tensor] = []
    cat = torch.cat

    def spy(parts: list[Tensor], **options: Any) -> Tensor:
        joined.extend(parts)
        return cat(parts, **options)

    student = make_student("base", 8)
    monkeypatch.setattr(torch, "cat", spy)
    pixels = np.zeros((5, 1, 8, 8, 3), np.uint8)
    numbers = np.arange(5)
    images = DecodedImages(pixels, numbers, numbers, np.zeros((5, 16), np.uint8), numbers % 3)
    evaluate_student(student, images, CPU, precision, 5)
    held = [part for part in joined if part.shape == (5, student.embed_dim)]
    assert held
    assert all(part.untyped_storage().nbytes() == 4 * 5 * student.embed_dim for part in held)


# From disk


def pixels_of_test() -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)) for image in make_images(12, 1)])


@pytest.fixture(scope="module")
def undecided() -> Student:
    """A student that gives different answers to the test images, right and wrong ones."""
    student = make_student("test_resnet", 8)
    with torch.no_grad():
        logits = student(student.normalise(pixels_of_test()))[1]
        student.classifier.bias.sub_(logits.mean(dim=0))
    return student


@pytest.fixture(scope="module")
def student_folder(undecided: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "student"
    save_student(undecided, folder)
    return folder


def evaluate(
    folder: Path, dataset: Path, split: str = "test", precision: Precision = "float32", skip_bad: bool = False
) -> Evaluation:
    return evaluate_run(
        EvaluateSettings(
            student=folder,
            data=DataSettings(dataset=str(dataset), split=split),
            precision=precision,
            device="cpu",
            skip_bad=skip_bad,
        )
    )


def test_labels_are_translated_by_name(tmp_path: Path) -> None:
    data = labelled(make_split(6, 0, ("cat", "ant", "bee")), tmp_path / "data")
    assert learned_labels(data, ("ant", "bee", "cat", "dog")).tolist() == [2, 0, 1, 2, 0, 1]


def test_a_name_without_images_may_be_unknown_to_the_student(tmp_path: Path) -> None:
    data = labelled(make_rows(make_images(2, 0), [1, 2], ("yak", "ant", "bee")), tmp_path / "data")
    assert learned_labels(data, CLASS_NAMES).tolist() == [0, 1]


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    data = labelled(make_split(6, 0, ("cat", "dog", "eel")), tmp_path / "data")
    with pytest.raises(PipelineError) as caught:
        learned_labels(data, ("ant", "bee", "cat", "fly"))
    assert str(caught.value) == (
        f"{tmp_path / 'data'}, split train: 2 of its classes were not learned (dog, eel). "
        "Learned were 4 classes, among them ant, bee, cat."
    )


def test_five_of_many_unknown_classes_are_named(tmp_path: Path) -> None:
    data = labelled(make_split(6, 0, tuple("uvwxyz")), tmp_path / "data")
    with pytest.raises(PipelineError, match=r"6 of its classes were not learned \(u, v, w, x, y, …\)\."):
        learned_labels(data, CLASS_NAMES)


def test_a_saved_student_is_evaluated_with_the_labels_names(student_folder: Path, tmp_path: Path) -> None:
    images, names = make_images(12, 1), ("cat", "ant", "bee")
    labels = [row % 3 for row in range(12)]
    make_rows(images, labels).save_to_disk(str(tmp_path / "data"))
    moved = [names.index(CLASS_NAMES[label]) for label in labels]
    make_rows(images, moved, names).save_to_disk(str(tmp_path / "moved"))
    first = evaluate(student_folder, tmp_path / "data", "train")
    second = evaluate(student_folder.parent, tmp_path / "moved", "train")
    assert first.count.tolist() == second.count.tolist() == [4, 4, 4]
    assert first.correct.tolist() == second.correct.tolist()
    assert first.class_names == CLASS_NAMES


def test_a_saved_students_accuracy_is_that_of_its_logits(
    undecided: Student, student_folder: Path, saved_data: Path
) -> None:
    labels = load_labelled(DataSettings(dataset=str(saved_data), split="test")).labels
    with torch.no_grad():
        answers = undecided(undecided.normalise(pixels_of_test()))[1].argmax(dim=1).numpy()
    assert len(set(answers.tolist())) == 3
    right = labels[answers == labels]
    assert evaluate(student_folder, saved_data).correct.tolist() == [int((right == label).sum()) for label in range(3)]


def test_bad_images_are_left_out_of_an_evaluation_only_if_asked(student_folder: Path, tmp_path: Path) -> None:
    cells: list[Any] = [{"bytes": b"junk", "path": None}, *make_images(2, 0)]
    make_rows(cells, [2, 0, 1]).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(PipelineError, match=r"row 0: the image cannot be decoded"):
        evaluate(student_folder, tmp_path / "data", "train")
    assert evaluate(student_folder, tmp_path / "data", "train", skip_bad=True).count.tolist() == [1, 1, 0]


def test_a_limited_evaluation_has_the_labels_of_its_images(student_folder: Path, tmp_path: Path) -> None:
    make_rows(make_images(5, 0), [0, 0, 0, 1, 2]).save_to_disk(str(tmp_path / "data"))
    data = DataSettings(dataset=str(tmp_path / "data"), split="train", limit=3)
    assert evaluate_run(
        EvaluateSettings(student=student_folder, data=data, precision="float32", device="cpu")
    ).count.tolist() == [1, 1, 1]
