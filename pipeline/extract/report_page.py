"""The report card as a page: what is said of a teacher on some data, with bars, a map of classes and doubtful images.

Measures nothing and reads no images: thumbnails are given by the caller.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from pipeline.accuracy import percent
from pipeline.errors import PipelineError
from pipeline.extract.report_card import ReportCard
from pipeline.pictures import plot_artifact
from pipeline.report import Bar, Block, Figure, Gallery, Notice, Section, Table, Thumbnail, render_report, short_name

_NUM_SMALL = 30


def report_card_page(card: ReportCard, source: str, class_map: Block, thumbnails: Mapping[int, Image.Image]) -> str:
    """Lay a report card out as an HTML page.

    Args:
        card: what was measured.
        source: which teacher on which data, in a few words.
        class_map: what `draw_class_map` returns.
        thumbnails: the images of doubtful labels by their row; of those that are missing only the caption is shown.

    Returns:
        The page: the same arguments give the same text.
    """
    content = f"{card.num_images:,} images, {card.num_classes:,} classes, embeddings of {card.embed_dim:,} values."
    lead: list[Block] = [content, *map(Notice, card.warnings())]
    sections = (
        Section("Accuracy", list(_accuracy(card))),
        Section("Shape of the embeddings", [_shape(card)]),
        Section("Map of classes", [class_map]),
        Section("Most confused classes", list(_confused(card))),
        Section("Most doubtful labels", list(_doubtful(card, thumbnails))),
        Section("Classes with few images", list(_small(card))),
        Section("Classes without held-out images", list(_names(card.classes_without_held_out))),
        Section("Classes with held-out images only", list(_names(card.classes_without_training))),
    )
    return render_report(f"Report card: {source}", lead, sections)


def draw_class_map(artifact: Path) -> Figure | str:
    """Draw the classes of an artifact as `store plot` does; what stands in the picture's way is returned instead.

    Args:
        artifact: the file.

    Returns:
        The picture, or why there is none.

    Raises:
        StoreError: the artifact is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "map.png"
        try:
            result = plot_artifact(artifact, out)
        except PipelineError as error:
            return f"There is no picture: {error}"
        notes = "".join(f" {note}." for note in result.notes)
        caption = "Classes that the teacher finds alike stand together: cosine similarity of their means, and maps."
        return Figure(out.read_bytes(), caption + notes)


def _accuracy(card: ReportCard) -> Iterator[Block]:
    if not card.accuracies():
        return
    explained = {
        "nearest mean": "what class means alone tell",
        "ridge head": "what a linear classifier reads from the embeddings",
        "10-NN": "the ten most similar images vote",
    }
    rows: list[Sequence[str | Bar]] = [
        (f"{name}: {explained[name]}", Bar(each.share, str(each), (each.low, each.high)))
        for name, each in card.accuracies()
    ]
    rows.append(("chance: always guessing one class", Bar(card.chance, percent(card.chance))))
    yield f"Measured on {card.basis()}. No classifier has seen them or a copy of them; in brackets the 95 % interval."
    yield Table(("classifier", "accuracy"), rows)


def _shape(card: ReportCard) -> Table:
    rows = [("effective rank", f"{card.effective_rank:.1f} of {card.embed_dim}", "directions that are in use")]
    for name, cosine, meaning in (
        ("mean cosine of class means", card.class_mean_cosine, "near 1: all classes point one way"),
        ("the same, less their mean", card.class_mean_cosine_centred, "0 or a little below: they point everywhere"),
    ):
        if cosine is not None:
            rows.append((name, f"{cosine:.3f}".replace("-", "−"), meaning))
    return Table(("measure", "value", "meaning"), rows)


def _confused(card: ReportCard) -> Iterator[Block]:
    if card.confused:
        yield "Held-out images of one class that the ridge head takes for another, and their share of the class's."
        yield Table(
            ("class", "taken for", "images", "share"),
            [
                (
                    short_name(each.label),
                    short_name(each.predicted),
                    each.num_images,
                    Bar(each.share, percent(each.share)),
                )
                for each in card.confused
            ],
        )


def _doubtful(card: ReportCard, thumbnails: Mapping[int, Image.Image]) -> Iterator[Block]:
    if card.doubtful:
        yield (
            f"{card.doubt()}, with a ridge head that has seen neither them nor a copy of them. Here are those that "
            "miss their own class by most: a wrong label, a rare view, or the teacher's own mistake."
        )
        yield Gallery(
            [
                Thumbnail(
                    thumbnails.get(each.row),
                    (short_name(each.label), f"looks like {short_name(each.predicted)}", f"row {each.row:,}"),
                )
                for each in card.doubtful
            ]
        )


def _small(card: ReportCard) -> Iterator[Block]:
    if card.small_classes:
        yield Table(
            ("class", "images"), [(short_name(each.name), each.num_images) for each in card.small_classes[:_NUM_SMALL]]
        )
        yield from _more(len(card.small_classes))


def _names(names: Sequence[str]) -> Iterator[Block]:
    if names:
        yield Table(("class",), [(short_name(name),) for name in names[:_NUM_SMALL]])
        yield from _more(len(names))


def _more(number: int) -> Iterator[Block]:
    if number > _NUM_SMALL:
        yield f"And {number - _NUM_SMALL:,} more: the card as JSON names all."
