from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.distill import predict as module
from pipeline.distill.predict import predict
from pipeline.distill.student import Student
from pipeline.errors import PipelineError
from tests.conftest import make_images
from tests.pipeline.distill.examples import make_student

CPU = torch.device("cpu")
SEVEN = ("ant", "bee", "cat", "dog", "eel", "fly", "gnu")


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("test_resnet", 8, SEVEN)


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def refusal(student: Student, *paths: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        predict(student, paths, CPU)
    return str(caught.value)


def test_the_five_most_probable_classes_come_best_first(student: Student, tmp_path: Path) -> None:
    images = make_images(2, 0)
    paths = [save(image, tmp_path / f"{index}.png") for index, image in enumerate(images)]
    answers = predict(student, paths, CPU)
    for image, answer in zip(images, answers, strict=True):
        with torch.no_grad():
            logits = student(student.normalise(torch.from_numpy(np.array(image))[None]))[1][0]
        probabilities = dict(zip(SEVEN, logits.softmax(dim=0).tolist(), strict=True))
        best = sorted(probabilities, key=lambda name: -probabilities[name])[:5]
        assert [name for name, _ in answer] == best
        assert [value for _, value in answer] == pytest.approx([probabilities[name] for name in best])
        assert sum(value for _, value in answer) < 1


def test_fewer_than_five_classes_are_all_listed(tmp_path: Path) -> None:
    (answer,) = predict(make_student("test_resnet", 8), [save(make_images(1, 0)[0], tmp_path / "a.png")], CPU)
    assert sorted(name for name, _ in answer) == ["ant", "bee", "cat"]
    assert sum(value for _, value in answer) == pytest.approx(1)


def test_an_image_is_classified_as_it_is_seen(student: Student, tmp_path: Path) -> None:
    seen = make_images(1, 0, size=16)[0]
    turned = seen.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 270° to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    layer = seen.convert("RGBA")
    paths = [save(seen, tmp_path / "seen.png"), tmp_path / "turned.png", save(layer, tmp_path / "layer.png")]
    first, second, third = predict(student, paths, CPU)
    assert first == second == third


def test_grey_images_of_any_size_are_classified(student: Student, tmp_path: Path) -> None:
    grey = make_images(1, 0, size=30)[0].convert("L").crop((0, 0, 30, 11))
    repeated = grey.convert("RGB")
    first, second = predict(student, [save(grey, tmp_path / "l.png"), save(repeated, tmp_path / "rgb.png")], CPU)
    assert first == second
    assert len(first) == 5


def test_a_missing_file_is_named(student: Student, tmp_path: Path) -> None:
    good, path = save(make_images(1, 0)[0], tmp_path / "a.png"), tmp_path / "b.png"
    assert refusal(student, good, path) == f"{path}: is not an image that can be read (no such file)."


def test_a_file_that_is_no_image_is_named(student: Student, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"junk")
    assert refusal(student, path) == (
        f"{path}: is not an image that can be read (cannot identify image file '{path}')."
    )


def test_none_is_classified_if_one_is_bad(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "forward", lambda pixels: pytest.fail("an image was classified"))
    path = save(make_images(1, 0)[0], tmp_path / "good.png")
    damaged = tmp_path / "cut.png"
    damaged.write_bytes(path.read_bytes()[:-30])
    assert refusal(student, path, damaged).startswith(f"{damaged}: is not an image that can be read (")


def test_an_error_without_a_text_is_named_by_its_kind(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(image: Image.Image) -> Image.Image:
        raise EOFError

    monkeypatch.setattr(module, "to_rgb", end)
    path = save(make_images(1, 0)[0], tmp_path / "a.png")
    assert refusal(student, path) == f"{path}: is not an image that can be read (EOFError)."


def test_a_strip_that_would_take_gigabytes_is_named(student: Student, tmp_path: Path) -> None:
    path = save(Image.new("L", (1, 65_000)), tmp_path / "strip.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.pixels.MAX_RESIZED_PX", 4_000_000)
        assert refusal(student, path) == (
            f"{path}: is too long for its width (it has 1×65000 pixels, 4,160,000 with a shorter side of 8; at most "
            "4,000,000 are taken). Crop it first."
        )
