"""Labelled images from whatever `datasets` loads."""

import errno
import importlib
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import (
    BadImageError,
    DataSettings,
    UnreadableImageError,
    evaluation_split,
    load_labelled,
    load_splits,
    raise_bad,
)
from pipeline.errors import PipelineError
from tests.conftest import CLASS_NAMES, make_images, make_split

pa: Any = importlib.import_module("pyarrow")  # without types
parquet: Any = importlib.import_module("pyarrow.parquet")

Columns = dict[str, tuple[Any, list[Any]]]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICTURE = datasets.Image()
INTEGER = datasets.Value("int64")
CLASSES = datasets.ClassLabel(names=["no", "yes"])
TWO_IMAGES = make_images(2, 0)
ADVICE_ON_DATA = (
    "Pass a hub name, or a folder of parquet files, of images in a folder each class, or of a saved data set."
)
ADVICE = "Mend or remove it, or pass --skip-bad to leave such images out and count them."


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cell(image: Image.Image) -> dict[str, Any]:
    return {"bytes": encode(image), "path": None}


def pixels(image: Any) -> NDArray[np.uint8]:
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return np.asarray(image)


def same_pixels(images: list[Any], expected: list[Image.Image]) -> bool:
    return all(np.array_equal(pixels(image), pixels(other)) for image, other in zip(images, expected, strict=True))


def save(folder: Path, columns: Columns) -> str:
    """Save a data set without splits; each column is its feature and its cells."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: cells for name, (_, cells) in columns.items()}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(folder))
    return str(folder)


def write_parquet(file: Path, columns: dict[str, Any]) -> str:
    """Write parquet as anybody would: no word of `datasets` in it."""
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), file)
    return str(file.parent)


def plain_images(images: list[Image.Image]) -> Any:
    return pa.array([cell(image) for image in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def refusal(dataset: object, **options: Any) -> str:
    with pytest.raises(PipelineError) as error:
        load_labelled(DataSettings(dataset=str(dataset), **options))
    return str(error.value)


# Sources


def test_a_saved_data_set_is_read(saved_data: Path) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data)))
    assert (len(data), data.num_rows_before_limit) == (30, 30)
    assert (data.image_column, data.label_column) == ("image", "label")
    assert (data.class_names, data.classes_named) == (CLASS_NAMES, True)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [row % 3 for row in range(30)]
    assert same_pixels(data.read(range(30)), make_images(30, 0))


def test_images_come_in_the_order_they_are_asked_for(saved_data: Path) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data), split="test"))
    images = make_images(12, 1)
    assert same_pixels(data.read([7, 0, 7]), [images[7], images[0], images[7]])


def test_a_data_set_saved_without_splits_is_its_training_split_only(tmp_path: Path) -> None:
    make_split(6, 0).save_to_disk(str(tmp_path / "bare"))
    settings = DataSettings(dataset=str(tmp_path / "bare"))
    assert len(load_labelled(settings)) == 6
    assert evaluation_split(load_splits(settings), settings.split) is None
    # Else an evaluation on `test` would silently be one on the training images.
    assert refusal(tmp_path / "bare", split="test") == f"{tmp_path / 'bare'}: no split 'test'. It has 'train'."


def test_parquet_that_datasets_wrote_keeps_its_class_names(tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    make_split(6, 0).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    make_split(3, 1).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    settings = DataSettings(dataset=str(folder))
    data = load_labelled(settings)
    assert (data.class_names, data.classes_named) == (CLASS_NAMES, True)
    assert same_pixels(data.read(range(6)), make_images(6, 0))
    assert evaluation_split(load_splits(settings), settings.split) == "test"


@pytest.mark.parametrize(
    "fields",
    [
        [("bytes", pa.binary()), ("path", pa.string())],
        [("path", pa.string()), ("bytes", pa.binary())],
        [("bytes", pa.large_binary()), ("path", pa.large_string())],
    ],
    ids=["bytes-path", "path-bytes", "large"],
)
def test_parquet_that_anybody_wrote_is_read(tmp_path: Path, fields: list[tuple[str, Any]]) -> None:
    images = make_images(3, 0)
    column = pa.array([cell(image) for image in images], pa.struct(fields))
    folder = write_parquet(tmp_path / "plain" / "images.parquet", {"picture": column, "kind": [2, 0, 2]})
    data = load_labelled(DataSettings(dataset=folder))
    assert (data.image_column, data.label_column) == ("picture", "kind")
    assert same_pixels(data.read(range(3)), images)
    # Labels without names: the names are the indices up to the largest one.
    assert (data.class_names, data.classes_named) == (("0", "1", "2"), False)
    assert data.labels.tolist() == [2, 0, 2]


def test_an_image_folder_has_its_folders_as_classes_and_splits(tmp_path: Path) -> None:
    images = make_images(6, 0)
    for row, image in enumerate(images):
        folder = tmp_path / "pets" / ("train" if row < 4 else "test") / CLASS_NAMES[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{row}.png")
    settings = DataSettings(dataset=str(tmp_path / "pets"))
    data = load_labelled(settings)
    assert (data.name, data.revision, data.licence) == ("pets", None, None)
    assert (data.class_names, data.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    assert same_pixels(data.read(range(4)), [images[row] for row in (0, 2, 1, 3)])
    assert evaluation_split(load_splits(settings), settings.split) == "test"
    assert len(load_labelled(settings.model_copy(update={"split": "test"}))) == 2


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_labels_that_are_names_become_classes_in_alphabetical_order(tmp_path: Path, dtype: str) -> None:
    labels = ["bee", "ant", "Öre", "bee"]
    folder = save(tmp_path / "names", {"image": (PICTURE, make_images(4, 0)), "kind": (datasets.Value(dtype), labels)})
    data = load_labelled(DataSettings(dataset=folder))
    assert (data.class_names, data.classes_named) == (("ant", "bee", "Öre"), True)
    assert data.labels.tolist() == [1, 0, 2, 1]


def test_class_labels_go_before_other_integers(tmp_path: Path) -> None:
    columns: Columns = {"id": (INTEGER, [7, 8]), "image": (PICTURE, TWO_IMAGES), "fine": (CLASSES, [1, 0])}
    folder = save(tmp_path / "both", columns)
    assert load_labelled(DataSettings(dataset=folder)).label_column == "fine"
    chosen = load_labelled(DataSettings(dataset=folder, label_column="id"))
    assert (chosen.label_column, chosen.classes_named, len(chosen.class_names)) == ("id", False, 9)


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    front, back = make_images(2, 1), make_images(2, 2)
    columns: Columns = {
        "front": (PICTURE, front),
        "back": (PICTURE, back),
        "coarse": (CLASSES, [0, 1]),
        "fine": (CLASSES, [1, 0]),
    }
    settings = DataSettings(dataset=save(tmp_path / "many", columns), image_column="back", label_column="fine")
    data = load_labelled(settings)
    assert same_pixels(data.read([0, 1]), back)
    assert data.labels.tolist() == [1, 0]


# Who the data set is


@pytest.mark.parametrize("dataset", [".", "../saved", "../saved/", "{folder}"])
def test_its_name_is_never_a_path(saved_data: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.chdir(saved_data)
    data = load_labelled(DataSettings(dataset=dataset.format(folder=saved_data)))
    assert (data.name, data.revision) == ("saved", None)


def test_local_parquet_gives_no_path_as_revision(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "plain" / "a.parquet", {"image": plain_images(TWO_IMAGES), "label": [0, 1]})
    data = load_labelled(DataSettings(dataset=folder))
    assert (data.name, data.revision) == ("plain", None)


def test_a_hub_data_set_has_the_commit_it_was_loaded_from(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_split(3, 0)
    rows.info.license = "mit"
    rows.info.download_checksums = {"https://elsewhere": {}, f"hf://datasets/org/pets@{COMMIT}/train.parquet": {}}
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.DatasetDict:
        asked.append((arguments, options))
        return datasets.DatasetDict(train=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_labelled(DataSettings(dataset="org/pets", config="small", revision="v1"))
    assert asked == [(("org/pets", "small"), {"revision": "v1"})]
    assert (data.name, data.revision, data.licence) == ("org/pets", COMMIT, "mit")


def test_a_hub_data_set_that_says_no_commit_has_the_revision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=make_split(3, 0)))
    data = load_labelled(DataSettings(dataset="org/pets", revision="v1"))
    assert (data.name, data.revision, data.licence) == ("org/pets", "v1", None)


# Refusals


@pytest.mark.parametrize(
    ("columns", "options", "problem"),
    [
        (
            {"image": (PICTURE, TWO_IMAGES), "coarse": (CLASSES, [0, 1]), "fine": (CLASSES, [0, 1])},
            {},
            "2 columns could be the label column (coarse, fine). Pass --label-column.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "id": (INTEGER, [0, 1]), "name": (datasets.Value("string"), ["a", "b"])},
            {},
            "2 columns could be the label column (id, name). Pass --label-column.",
        ),
        (
            {"left": (PICTURE, TWO_IMAGES), "right": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])},
            {},
            "2 columns could be the image column (left, right). Pass --image-column.",
        ),
        (
            {"text": (datasets.Value("string"), ["a", "b"]), "label": (CLASSES, [0, 1])},
            {},
            "0 columns could be the image column (none). Its columns are text, label.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "score": (datasets.Value("float32"), [0.5, 1.0])},
            {},
            "0 columns could be the label column (none). Its columns are image, score.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])},
            {"image_column": "img"},
            "no column 'img'. Candidates for --image-column: image.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])},
            {"label_column": "fine"},
            "no column 'fine'. Candidates for --label-column: label.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])},
            {"image_column": "label"},
            "column 'label' is ClassLabel(names=['no', 'yes']), expected images. Candidates for --image-column: image.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "score": (datasets.Value("float32"), [0.5, 1.0])},
            {"label_column": "score"},
            "column 'score' is Value('float32'), expected classes (class labels, integers or names). "
            "Candidates for --label-column: none.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "tags": (datasets.List(INTEGER), [[0], [1, 0]])},
            {"label_column": "tags"},
            "column 'tags' is List(Value('int64')), expected classes (class labels, integers or names). "
            "Candidates for --label-column: none.",
        ),
        (
            {"image": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])},
            {"label_column": "image"},
            "column 'image' is Image(mode=None, decode=True), expected classes (class labels, integers or names). "
            "Candidates for --label-column: label.",
        ),
    ],
    ids=[
        "two-class-labels",
        "two-values",
        "two-images",
        "no-image",
        "no-label",
        "image-column-missing",
        "label-column-missing",
        "image-column-is-no-image",
        "labels-are-floats",
        "labels-are-lists",
        "labels-are-images",
    ],
)
def test_columns_that_do_not_fit_are_named(
    tmp_path: Path, columns: Columns, options: dict[str, str], problem: str
) -> None:
    folder = save(tmp_path / "odd", columns)
    assert refusal(folder, **options) == f"{folder}: {problem}"


UNLABELLED = "Is this an unlabelled split? Choose another with --split or --eval-split."


@pytest.mark.parametrize(
    ("feature", "labels", "problem"),
    [
        (CLASSES, [0, -1], ", row 1: label is -1, which is no class. " + UNLABELLED),
        (INTEGER, [-3, -4], ", row 0: label is -3, which is no class. " + UNLABELLED),
        (CLASSES, [None, 1], ": 1 rows have no label."),
        (datasets.Value("string"), [None, None], ": 2 rows have no label."),
    ],
    ids=["unlabelled", "negative", "null", "null-name"],
)
def test_rows_without_a_class_are_refused(tmp_path: Path, feature: Any, labels: list[Any], problem: str) -> None:
    folder = save(tmp_path / "odd", {"image": (PICTURE, TWO_IMAGES), "label": (feature, labels)})
    assert refusal(folder) == f"{folder}, split train{problem}"


def test_numbers_too_large_for_indices_are_no_classes(tmp_path: Path) -> None:
    folder = save(tmp_path / "data", {"image": (PICTURE, TWO_IMAGES), "label": (INTEGER, [0, 2**40])})
    expected = f"{folder}, split train: label goes up to {2**40}, expected class indices from 0 on."
    assert refusal(folder) == expected


def test_a_class_label_beyond_the_named_classes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "parquet" / "train.parquet"
    file.parent.mkdir()
    make_split(3, 0).to_parquet(str(file))
    table = parquet.read_table(file)
    where = table.schema.get_field_index("label")
    parquet.write_table(table.set_column(where, table.schema.field(where), pa.array([0, 7, 2])), file)
    assert refusal(file.parent) == (
        f"{file.parent}, split train, row 1: label is 7, but the data set names 3 classes. "
        "Mend its labels or its class names."
    )


def test_a_split_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=make_split(0, 0)))
    assert refusal("org/pets") == "org/pets, split train: it has no rows."


def test_a_missing_split_is_refused_with_a_list(saved_data: Path) -> None:
    assert refusal(saved_data, split="val") == f"{saved_data}: no split 'val'. It has 'train', 'test'."


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/no-such-folder-at-all", "{tmp_path}/nowhere"])
def test_a_missing_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = name.format(tmp_path=tmp_path)
    assert refusal(dataset) == f"{dataset}: no such data set folder. Check --dataset."


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.touch()
    assert refusal(file) == f"{file}: is a file. Pass the folder that holds it as --dataset."


def test_what_a_folder_does_not_have_cannot_be_chosen(saved_data: Path, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "plain" / "a.parquet", {"image": plain_images(TWO_IMAGES), "label": [0, 1]})
    assert refusal(folder, revision="v1") == f"{folder}: a folder has no --dataset-revision. Leave that out."
    assert refusal(saved_data, config="small", revision="v1") == (
        f"{saved_data}: a saved data set has no --dataset-config and no --dataset-revision. Leave that out."
    )
    assert refusal(saved_data, config="") == f"{saved_data}: a saved data set has no --dataset-config. Leave that out."


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    message = refusal(folder)
    assert message.startswith(f"{folder}: the data set cannot be loaded (")
    assert message.endswith(f"). {ADVICE_ON_DATA}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConnectionError("no route to host\nmore of it"), "no route to host"), (TimeoutError(), "TimeoutError")],
)
def test_a_hub_data_set_without_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refusal("org/pets") == f"org/pets: the data set cannot be loaded ({reason}). {ADVICE_ON_DATA}"


def test_data_that_cannot_be_converted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        try:
            raise ValueError("parquet is damaged")
        except ValueError as error:
            message = "An error occurred while generating the dataset"
            raise datasets.exceptions.DatasetGenerationError(message) from error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refusal("org/pets") == f"org/pets: the data set cannot be loaded (parquet is damaged). {ADVICE_ON_DATA}"


def test_a_damaged_saved_data_set_is_refused(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "damaged", {"image": (PICTURE, TWO_IMAGES), "label": (CLASSES, [0, 1])}))
    next(folder.glob("*.arrow")).unlink()
    message = refusal(folder)
    assert message.startswith(f"{folder}: the data set cannot be loaded (")
    assert "\n" not in message


# Limit and evaluation split


def test_a_limit_takes_the_first_rows_of_every_class_in_turn(tmp_path: Path) -> None:
    labels = [0] * 10 + [1] * 3 + [2]
    images = make_images(14, 0)
    folder = save(tmp_path / "limited", {"image": (PICTURE, images), "label": (INTEGER, labels)})
    for limit, kept in ((3, [0, 10, 13]), (5, [0, 1, 10, 11, 13]), (9, [0, 1, 2, 3, 4, 10, 11, 12, 13])):
        data = load_labelled(DataSettings(dataset=folder, limit=limit))
        assert data.labels.tolist() == [labels[row] for row in kept]
        assert same_pixels(data.read(range(limit)), [images[row] for row in kept])
        assert (data.num_rows_before_limit, data.class_names) == (14, ("0", "1", "2"))


@pytest.mark.parametrize("limit", [30, 31])
def test_a_limit_of_all_rows_or_more_changes_nothing(saved_data: Path, limit: int) -> None:
    data = load_labelled(DataSettings(dataset=str(saved_data), limit=limit))
    assert data.labels.tolist() == [row % 3 for row in range(30)]


@pytest.mark.parametrize(
    ("splits", "train", "expected"),
    [
        (["dev", "val", "valid", "validation", "test", "train"], "train", "test"),
        (["dev", "val", "valid", "validation", "test", "train"], "test", "validation"),
        (["dev", "val", "valid", "train"], "train", "valid"),
        (["dev", "val", "train"], "train", "val"),
        (["dev", "train"], "train", "dev"),
        (["train", "extra"], "train", None),
    ],
)
def test_the_evaluation_split_is_the_first_by_habit(
    tmp_path: Path, splits: list[str], train: str, expected: str | None
) -> None:
    rows = datasets.Dataset.from_dict({"label": [0]})
    datasets.DatasetDict(dict.fromkeys(splits, rows)).save_to_disk(str(tmp_path / "splits"))
    assert evaluation_split(load_splits(DataSettings(dataset=str(tmp_path / "splits"))), train) == expected


# Images that cannot be decoded


def test_images_that_cannot_be_decoded_are_errors_among_the_images(tmp_path: Path) -> None:
    image = make_images(1, 0)[0]
    cells = [
        cell(image),
        None,
        {"bytes": b"no image at all", "path": None},
        {"bytes": encode(image)[:60], "path": None},
        {"bytes": encode(Image.new("F", (2, 2)), "TIFF"), "path": None},
        cell(image),
    ]
    folder = save(tmp_path / "damaged", {"image": (PICTURE, cells), "label": (INTEGER, [0] * 6)})
    read = load_labelled(DataSettings(dataset=folder)).read(range(6))
    assert same_pixels([read[0], read[5]], [image, image])
    errors = [str(error) for error in read[1:5] if isinstance(error, BadImageError)]
    assert len(errors) == 4
    for row, message in enumerate(errors, 1):
        assert message.startswith(f"{folder}, split train, row {row}: the image cannot be decoded (")
        assert message.endswith(f"). {ADVICE}")
    assert "(the cell is empty)" in errors[0]
    assert "(its pixels are floating-point numbers; 8 or 16 bits are expected)" in errors[3]


def test_an_image_file_that_has_gone_is_an_error(tmp_path: Path) -> None:
    files = [tmp_path / "pets" / "train" / name / "0.png" for name in ("ant", "bee")]
    for file, image in zip(files, TWO_IMAGES, strict=True):
        file.parent.mkdir(parents=True)
        image.save(file)
    data = load_labelled(DataSettings(dataset=str(tmp_path / "pets")))
    files[1].unlink()
    found, gone = data.read([0, 1])
    assert same_pixels([found], TWO_IMAGES[:1])
    assert str(gone) == (
        f"{tmp_path / 'pets'}, split train, row 1: the image cannot be decoded "
        f"([Errno 2] No such file or directory: '{files[1]}'). {ADVICE}"
    )


def test_an_error_without_text_is_named_by_its_kind(saved_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EOFError

    monkeypatch.setattr(Image, "open", fail)
    error = load_labelled(DataSettings(dataset=str(saved_data))).read([2])[0]
    assert str(error) == f"{saved_data}, split train, row 2: the image cannot be decoded (EOFError). {ADVICE}"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), f"[Errno {errno.ESTALE}] Stale file handle"),
        (OSError(errno.EMFILE, "Too many open files"), "[Errno 24] Too many open files"),
        (MemoryError(), "MemoryError"),
        (OSError("out of memory error when reading image file"), "out of memory error when reading image file"),
    ],
    ids=str,
)
def test_a_failure_that_may_pass_is_no_property_of_the_image(
    saved_data: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    data = load_labelled(DataSettings(dataset=str(saved_data)))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        (error,) = data.read([0])
    assert isinstance(error, UnreadableImageError)
    assert str(error) == (
        f"{saved_data}, split train, row 0: the image could not be read just now ({reason}). Give the same command "
        "again; if it fails every time, see to the disk and to free memory."
    )
    assert isinstance(data.read([0])[0], Image.Image)


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG])
def test_a_file_that_stays_unreadable_is_a_bad_image(
    saved_data: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Image, "open", fail)
    (error,) = load_labelled(DataSettings(dataset=str(saved_data))).read([0])
    assert type(error) is BadImageError
    assert str(error).endswith(f": the image cannot be decoded ([Errno {number}] no). {ADVICE}")


def test_rows_that_cannot_be_read_at_all_are_errors_that_may_pass(
    saved_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: datasets.Dataset, rows: list[int]) -> None:
        raise OSError(errno.EIO, "Input/output error")

    data = load_labelled(DataSettings(dataset=str(saved_data)))
    monkeypatch.setattr(datasets.Dataset, "__getitem__", fail)
    errors = data.read([3, 4])
    assert [type(error) for error in errors] == [UnreadableImageError] * 2
    assert str(errors[1]).startswith(f"{saved_data}, split train, row 4: the image could not be read just now (")


def test_of_images_that_are_no_use_only_the_bad_ones_may_be_left_out() -> None:
    bad, unreadable = BadImageError("bad"), UnreadableImageError("unreadable")
    raise_bad([], skip_bad=False)
    raise_bad([bad, bad], skip_bad=True)
    with pytest.raises(BadImageError, match=r"^bad$"):
        raise_bad([bad, unreadable], skip_bad=False)
    with pytest.raises(UnreadableImageError, match=r"^unreadable$"):
        raise_bad([bad, unreadable], skip_bad=True)


def test_bytes_that_are_no_image_say_the_same_every_time(tmp_path: Path) -> None:
    cells = [{"bytes": b"no image at all", "path": None}]
    folder = save(tmp_path / "damaged", {"image": (PICTURE, cells), "label": (INTEGER, [0])})
    error = load_labelled(DataSettings(dataset=folder)).read([0])[0]
    assert str(error) == (
        f"{folder}, split train, row 0: the image cannot be decoded (not an image of a known format). {ADVICE}"
    )


def test_the_row_that_is_named_is_a_row_of_the_split(tmp_path: Path) -> None:
    cells = [*map(cell, make_images(2, 0)), None]
    folder = save(tmp_path / "damaged", {"image": (PICTURE, cells), "label": (INTEGER, [0, 0, 1])})
    error = load_labelled(DataSettings(dataset=folder, limit=2)).read([1])[0]
    assert str(error).startswith(f"{folder}, split train, row 2: the image cannot be decoded (the cell is empty)")
