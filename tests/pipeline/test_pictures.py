"""Pictures of artifacts: what is drawn, what strangers' names do to it, and what is refused."""

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

import store
from pipeline import pictures
from pipeline.errors import PipelineError
from pipeline.pictures import Method, PlotResult, plot_artifact
from tests.store.examples import Tensors, class_tensors, document_of, file_names, make_manifest, save_foreign

ROOT = Path(__file__).parents[2]
ODD_NAMES = (
    "$x^2$",
    "$\\frac{",
    "two\nlines\tand\x07 a bell",
    "",
    " \x1b\x00 ",
    "猫の写真",
    "मछली",
    "_hidden",
    "\u202eevil",
    "--> <b>&amp;</b>",
    "w" * 100_000,
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Let every warning fail the test: none may reach a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved; rendering is left out, for it takes most of the time."""
    saved: list[Figure] = []

    def save(figure: Figure, file: Any, **options: object) -> None:
        saved.append(figure)
        file.write(b"a picture")

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def groups(num_classes: int, num_groups: int, embed_dim: int = 8) -> Tensors:
    """Make class tensors in which classes of equal index modulo `num_groups` are alike."""
    random = np.random.default_rng(0)
    centres = 5 * random.normal(size=(num_groups, embed_dim))
    means = centres[np.arange(num_classes) % num_groups] + random.normal(size=(num_classes, embed_dim)) + 100
    return {**class_tensors(num_classes, embed_dim), "class/mean": means.astype(np.float32)}


def samples(labels: Any, embeddings: Any) -> Tensors:
    """Make sample tensors of one view, keys in order."""
    keys = np.zeros((len(labels), 16), np.uint8)
    keys[:, 0], keys[:, 1] = np.divmod(np.arange(len(labels)), 256)
    embeddings = np.asarray(embeddings, np.float32)[:, None]
    return {"sample/key": keys, "sample/label": np.asarray(labels, np.int32), "sample/embedding": embeddings}


def write(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    """Write an artifact into the folder."""
    num_classes, embed_dim = tensors["class/mean"].shape
    manifest = make_manifest(num_classes, embed_dim, 1, **fields)
    store.write_artifact(folder / "artifact.safetensors", manifest, tensors)
    return folder / "artifact.safetensors"


def plot(folder: Path, tensors: Tensors, method: Method = "tsne", **fields: Any) -> PlotResult:
    """Write an artifact and draw it."""
    return plot_artifact(write(folder, tensors, **fields), folder / "picture.png", method=method)


def refusal(path: Path, out: Path, *, overwrite: bool = False) -> str:
    """Return the one line with which drawing fails."""
    with pytest.raises(PipelineError) as error:
        plot_artifact(path, out, method="pca", overwrite=overwrite)
    assert "\n" not in str(error.value)
    return str(error.value)


def tick_names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def written_names(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]


def places(axes: Axes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(axes.collections[0].get_offsets(), np.float64)


def marker_sizes(axes: Axes) -> np.ndarray[Any, np.dtype[np.float64]]:
    markers = axes.collections[0]
    assert isinstance(markers, PathCollection)
    return np.asarray(markers.get_sizes(), np.float64)


def test_classes_are_drawn_as_a_matrix_and_a_map(tmp_path: Path, figures: list[Figure]) -> None:
    result = plot(tmp_path, groups(6, 2))
    assert result == PlotResult(tmp_path / "picture.png", num_classes=6, num_samples=0, notes=())
    assert figures[0].texts[0].get_text() == "owner/teacher on owner/images\n6 classes × 8 values"
    matrix, plane = figures[0].axes
    assert matrix.get_title("left") == "Cosine similarity of class means, centred"
    assert plane.get_title("left") == "Class means by t-SNE"
    assert sorted(text.get_text() for text in written_names(plane)) == [f"class {row}" for row in range(6)]


def test_samples_get_a_map_of_their_own_with_a_legend(tmp_path: Path, figures: list[Figure]) -> None:
    tensors = groups(3, 3)
    labels = np.arange(30) % 3
    tensors |= samples(labels, tensors["class/mean"][labels] + np.arange(30)[:, None] / 30)
    result = plot(tmp_path, tensors, "pca")
    assert (result.num_classes, result.num_samples, result.notes) == (3, 30, ())
    axes = figures[0].axes[2]
    assert axes.get_title("left") == "30 samples by PCA"
    legend = axes.get_legend()
    assert legend is not None
    assert sorted(text.get_text() for text in legend.get_texts()) == ["class 0", "class 1", "class 2"]


def test_a_sample_has_the_colour_of_its_class(tmp_path: Path, figures: list[Figure]) -> None:
    tensors = groups(4, 2)
    labels = np.array([2, 0, 3, 1])
    plot(tmp_path, tensors | samples(labels, tensors["class/mean"][labels]), "pca")
    matrix, plane, cloud = figures[0].axes
    order = [int(name.removeprefix("class ")) for name in tick_names(matrix)]
    of_classes, of_samples = (np.asarray(axes.collections[0].get_facecolor()) for axes in (plane, cloud))
    assert [order[np.argmin(np.abs(of_classes - colour).sum(axis=1))] for colour in of_samples] == [2, 0, 3, 1]
    # Samples that are the means themselves lie where these lie.
    np.testing.assert_allclose(places(cloud), places(plane)[np.argsort(order)[labels]], atol=1e-5)


def test_similar_classes_stand_together(tmp_path: Path, figures: list[Figure]) -> None:
    plot(tmp_path, groups(12, 3), "pca")
    order = [int(name.removeprefix("class ")) % 3 for name in tick_names(figures[0].axes[0])]
    assert sum(left != right for left, right in itertools.pairwise(order)) == 2
    similarity = np.asarray(figures[0].axes[0].images[0].get_array())
    np.testing.assert_allclose(np.diag(similarity), 1)
    assert similarity[:4, :4].min() > 0.8 > 0.2 > similarity[:4, 4:].max()


def test_the_similarity_is_the_cosine_of_the_centred_means(tmp_path: Path, figures: list[Figure]) -> None:
    means = np.array([[10, 11], [10, 9], [10, 10]], np.float32)
    plot(tmp_path, {**class_tensors(3, 2), "class/mean": means})
    matrix = figures[0].axes[0]
    order = [int(name.removeprefix("class ")) for name in tick_names(matrix)]
    expected = np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(np.asarray(matrix.images[0].get_array()), expected[order][:, order], atol=1e-12)
    assert sorted(text.get_text() for text in matrix.texts) == sorted(["1.00"] * 2 + ["−1.00"] * 2 + ["0.00"] * 5)


def test_int8_samples_lie_where_the_float_ones_lie(tmp_path: Path, figures: list[Figure]) -> None:
    random = np.random.default_rng(0)
    whole = random.integers(-127, 128, (9, 8)).astype(np.int8)
    scale = random.uniform(1, 2, (9, 1)).astype(np.float32)
    labels = np.arange(9) % 3
    for name, stored in (
        ("float", samples(labels, whole * scale)),
        ("int8", {**samples(labels, whole), "sample/embedding": whole[:, None], "sample/scale": scale}),
    ):
        (tmp_path / name).mkdir()
        plot(tmp_path / name, groups(3, 3) | stored, "pca")
    np.testing.assert_allclose(places(figures[0].axes[2]), places(figures[1].axes[2]), atol=1e-5)


def test_a_marker_is_larger_the_more_images(tmp_path: Path, figures: list[Figure]) -> None:
    plot(tmp_path, groups(3, 3) | {"class/count": np.array([1, 50, 100], np.int64)})
    order = [int(name.removeprefix("class ")) for name in tick_names(figures[0].axes[0])]
    sizes = marker_sizes(figures[0].axes[1])
    assert sizes[np.argsort(order)].tolist() == sorted(sizes)


def test_more_than_can_be_drawn_is_chosen_at_random(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_CLASSES", 4)
    monkeypatch.setattr(pictures, "MAX_SAMPLES", 5)
    tensors = groups(9, 3)
    path = write(tmp_path, tensors | samples(np.arange(90) % 9, np.repeat(tensors["class/mean"], 10, axis=0)))
    results = [
        plot_artifact(path, tmp_path / "picture.png", method="pca", overwrite=True, seed=seed) for seed in (0, 1)
    ]
    notes = ("4 of 9 classes (chosen at random)", "5 of 90 samples (chosen at random)")
    assert [(result.num_classes, result.num_samples, result.notes) for result in results] == [(4, 5, notes)] * 2
    assert figures[0].texts[0].get_text().splitlines()[1] == f"{notes[0]} × 8 values"
    assert figures[0].axes[2].get_title("left") == f"{notes[1]} by PCA"
    assert set(tick_names(figures[0].axes[0])) != set(tick_names(figures[1].axes[0]))


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("embed_dim", [1, 2, 60])
def test_any_number_of_classes_can_be_drawn(
    tmp_path: Path, figures: list[Figure], method: Method, num_classes: int, embed_dim: int
) -> None:
    result = plot(tmp_path, groups(num_classes, num_classes, embed_dim), method)
    fell_back = method == "tsne" and num_classes < 4
    assert result.notes == (("PCA in place of t-SNE for fewer than 4 points",) if fell_back else ())
    assert np.isfinite(places(figures[0].axes[1])).all()
    plural = "class" if num_classes == 1 else "classes"
    shown = f"{num_classes} {plural} × {embed_dim} values"
    assert figures[0].texts[0].get_text().splitlines()[1] == shown


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_any_number_of_samples_can_be_drawn(
    tmp_path: Path, figures: list[Figure], method: Method, num_samples: int
) -> None:
    embeddings = np.random.default_rng(0).normal(size=(num_samples, 8))
    result = plot(tmp_path, groups(2, 2) | samples([1] * num_samples, embeddings), method)
    assert result.num_samples == num_samples
    assert np.isfinite(places(figures[0].axes[2])).all()


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("value", [0.0, 0.1, 3e38])
def test_equal_embeddings_lie_on_one_point(tmp_path: Path, figures: list[Figure], method: Method, value: float) -> None:
    means = np.full((7, 3), value, np.float32)
    plot(tmp_path, {**class_tensors(7, 3), "class/mean": means, **samples([0] * 9, [means[0]] * 9)}, method)
    similarity = np.asarray(figures[0].axes[0].images[0].get_array())
    assert not similarity.any()
    assert not places(figures[0].axes[1]).any()
    assert not places(figures[0].axes[2]).any()


def test_embeddings_of_any_length_can_be_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    means = np.array([[3e38, 0], [-3e38, 1], [0, 3e38], [1e-38, 0], [0, 0], [1e-45, -1e-45]], np.float32)
    plot(tmp_path, {**class_tensors(6, 2), "class/mean": means})
    assert np.isfinite(places(figures[0].axes[1])).all()


def test_counts_that_no_artifact_should_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match=r"class/count has a value of -5, expected at least 1\."):
        plot(tmp_path, groups(3, 3) | {"class/count": np.array([0, -5, 0], np.int64)})


def test_samples_of_no_class_are_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    tensors = groups(3, 3) | samples([-1, 3, 2**31 - 1], np.ones((3, 8)))
    result = plot(tmp_path, tensors)
    assert (result.num_samples, len(figures[0].axes)) == (0, 2)


def test_names_are_cleaned_and_shortened(tmp_path: Path, figures: list[Figure]) -> None:
    num_classes = len(ODD_NAMES)
    tensors = groups(num_classes, 3)
    tensors |= samples(np.arange(num_classes), tensors["class/mean"])
    plot(tmp_path, tensors, "pca", classes=ODD_NAMES)
    cleaned = {
        *("$x^2$", "$\\frac{", "two lines and a bell", "(no name)", "猫の写真", "मछली", "_hidden", "evil"),
        *("--> <b>&amp;</b>", "w" * 23 + "…"),
    }
    matrix, plane, cloud = figures[0].axes
    legend = cloud.get_legend()
    assert legend is not None
    assert set(tick_names(matrix)) == cleaned
    assert {text.get_text() for text in written_names(plane)} == cleaned
    assert {text.get_text() for text in legend.get_texts()} == cleaned
    names = [text for text in figures[0].findobj(Text) if isinstance(text, Text) and text.get_text() in cleaned]
    assert len(names) >= 4 * num_classes
    assert not any(text.get_parse_math() for text in names)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_odd_names_are_drawn_without_warnings(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, groups(len(ODD_NAMES), 3), classes=ODD_NAMES)
    with mpl.rc_context({"text.usetex": True, "axes.titlesize": 40}):  # a user's own settings
        plot_artifact(path, tmp_path / f"picture{suffix}", method="pca")
        assert mpl.rcParams["text.usetex"]
    assert (tmp_path / f"picture{suffix}").stat().st_size > 10_000


def test_an_odd_teacher_and_data_set_are_cleaned(tmp_path: Path, figures: list[Figure]) -> None:
    teacher = make_manifest(2, 8).teacher.model_copy(update={"name": "$\n" + "t" * 100})
    data_set = make_manifest(2, 8).data_set.model_copy(update={"name": "\x1b[2Jdata"})
    plot(tmp_path, groups(2, 2), teacher=teacher, data_set=data_set)
    assert figures[0].texts[0].get_text() == f"$ {'t' * 57}… on [2Jdata\n2 classes × 8 values"


def test_all_names_of_few_classes_are_written_apart_even_on_one_point(tmp_path: Path, figures: list[Figure]) -> None:
    classes = [f"class {row:02d} with a long name" for row in range(30)]
    plot(tmp_path, {**class_tensors(30, 4), "class/mean": np.ones((30, 4), np.float32)}, classes=classes)
    assert_names_lie_apart(figures[0].axes[1], 30)


def test_names_of_a_hundred_classes_are_written_apart(tmp_path: Path, figures: list[Figure]) -> None:
    plot(tmp_path, groups(100, 20), "pca")
    assert_names_lie_apart(figures[0].axes[1], 100)
    assert len(tick_names(figures[0].axes[0])) == 100


def test_of_many_classes_only_names_that_have_room_are_written(tmp_path: Path, figures: list[Figure]) -> None:
    tensors = groups(200, 2)
    plot(tmp_path, tensors | samples(np.arange(200), tensors["class/mean"]), "pca")
    assert tick_names(figures[0].axes[0]) == []
    assert written_names(figures[0].axes[2]) == []
    num_written = len(written_names(figures[0].axes[1]))
    assert 10 < num_written < 200
    assert_names_lie_apart(figures[0].axes[1], num_written)


def test_samples_of_more_classes_than_a_legend_holds_get_names(tmp_path: Path, figures: list[Figure]) -> None:
    tensors = groups(21, 21)
    plot(tmp_path, tensors | samples(np.arange(20), tensors["class/mean"][:20]), "pca")
    axes = figures[0].axes[2]
    assert axes.get_legend() is None
    assert {text.get_text() for text in written_names(axes)} == {f"class {row}" for row in range(20)}


def assert_names_lie_apart(axes: Axes, num_names: int) -> None:
    boxes = np.array([text.get_window_extent().extents for text in written_names(axes)])
    assert len(boxes) == num_names
    shrunk = boxes + np.array([1, 1, -1, -1])  # in pixels, for rounding
    apart = (shrunk[:, None, :2] >= shrunk[:, 2:]).any(axis=2)
    overlapping = ~(apart | apart.T)
    assert np.argwhere(overlapping & ~np.eye(len(boxes), dtype=bool)).tolist() == []


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_artifact_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    tensors = groups(5, 2)
    path = write(tmp_path, tensors | samples(np.arange(40) % 5, np.random.default_rng(0).normal(size=(40, 8))))
    outs = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for out in outs:
        plot_artifact(path, out)
    first, second = (out.read_bytes() for out in outs)
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert b"date>" not in first
    assert file_names(tmp_path) == ["artifact.safetensors", f"one{suffix}", f"two{suffix}"]


def test_importing_and_drawing_leave_pyplot_alone(tmp_path: Path) -> None:
    path = write(tmp_path, groups(3, 3))
    code = (
        "import sys; from pathlib import Path; import pipeline.pictures as pictures\n"
        "print([name for name in ('matplotlib', 'scipy', 'sklearn') if name in sys.modules])\n"
        f"pictures.plot_artifact(Path({str(path)!r}), Path({str(tmp_path / 'a.png')!r}))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]
    assert done.stderr == ""


def test_a_name_that_is_no_pictures_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.h5"
    for name, suffix in (("picture.pdf", "'.pdf'"), ("picture", "''")):
        out = tmp_path / name
        assert refusal(missing, out) == f"{out}: a picture's name ends in .png or .svg, found {suffix}."


def test_an_existing_picture_is_replaced_only_on_demand(tmp_path: Path, figures: list[Figure]) -> None:
    path, out = write(tmp_path, groups(2, 2)), tmp_path / "picture.png"
    out.write_bytes(b"old")
    assert refusal(path, out) == f"{out}: exists. Choose another --out, or pass --overwrite."
    assert out.read_bytes() == b"old"
    plot_artifact(path, out, overwrite=True)
    assert out.read_bytes() == b"a picture"


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "folder.png"
    out.mkdir()
    assert refusal(tmp_path / "none.h5", out, overwrite=True) == f"{out}: is a folder. Choose another --out."


def test_the_folder_must_exist(tmp_path: Path) -> None:
    out = tmp_path / "none" / "picture.svg"
    expected = f"{out}: the folder {tmp_path / 'none'} does not exist. Make it first."
    assert refusal(tmp_path / "none.h5", out) == expected


@pytest.mark.parametrize(
    ("module", "package"),
    [("matplotlib.style", "matplotlib"), ("scipy.cluster.hierarchy", "scipy"), ("sklearn.manifold", "scikit-learn")],
)
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert refusal(tmp_path / "none.h5", tmp_path / "picture.png") == (
        f"store plot needs {package}, which is not installed: pip install 'clip-embed-kd[plot]'"
    )


def test_a_missing_artifact_is_the_stores_matter(tmp_path: Path) -> None:
    with pytest.raises(store.ArtifactNotFoundError):
        plot_artifact(tmp_path / "none.h5", tmp_path / "picture.png")
    assert file_names(tmp_path) == []


def test_damaged_means_are_not_drawn(tmp_path: Path) -> None:
    path = write(tmp_path, groups(3, 3))
    raw = path.read_bytes()
    damaged = raw.replace(groups(3, 3)["class/mean"].tobytes(), groups(3, 3)["class/mean"][::-1].tobytes())
    path.write_bytes(damaged)
    with pytest.raises(store.ArtifactDigestError):
        plot_artifact(path, tmp_path / "picture.png")
    assert file_names(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["nan", "scale"])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    embeddings = np.full((2, 4), 127 if kind == "scale" else np.nan)
    tensors = {**class_tensors(3, 4), **samples([0, 1], embeddings)}
    if kind == "scale":
        tensors["sample/embedding"] = tensors["sample/embedding"].astype(np.int8)
        tensors["sample/scale"] = np.full((2, 1), 3e38, np.float32)
    document = document_of(tensors)
    document["sampling"]["views"] = 1
    path = tmp_path / "artifact.safetensors"
    save_foreign(path, document, tensors)
    assert refusal(path, tmp_path / "picture.png") == (
        "artifact.safetensors: a sample is not finite. The file is damaged: extract it again."
    )
    assert file_names(tmp_path) == [path.name]


def test_nothing_is_left_behind_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(figure: Figure, file: Any, **options: object) -> None:
        file.write(b"half a pic")
        raise MemoryError

    monkeypatch.setattr(Figure, "savefig", fail)
    path, out = write(tmp_path, groups(2, 2)), tmp_path / "picture.png"
    out.write_bytes(b"old")
    with pytest.raises(MemoryError):
        plot_artifact(path, out, overwrite=True)
    assert file_names(tmp_path) == [path.name, out.name]
    assert out.read_bytes() == b"old"


@pytest.mark.usefixtures("figures")
def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    path, out = write(tmp_path, groups(2, 2)), tmp_path / "picture.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", fail)
    assert refusal(path, out, overwrite=True) == f"{out}: cannot be written (No space left on device)."
    assert file_names(tmp_path) == [path.name, out.name]
    assert out.read_bytes() == b"old"
