"""Other images than those of the artifact, embedded to measure the report card's accuracies on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.data import Labelled, load_labelled
from pipeline.errors import PipelineError, listed
from pipeline.extract.config import ExtractSettings
from pipeline.extract.embed import Embedder, make_plan
from pipeline.extract.grading import MAX_HELD_OUT
from pipeline.extract.partial import chunk_dtype


def load_evaluation(settings: ExtractSettings, class_names: Sequence[str]) -> Labelled | None:
    """Load the split to measure on.

    Args:
        settings: of the extraction; `limit` holds for this split too.
        class_names: C classes of the artifact, in row order.

    Returns:
        The split with the artifact's classes; none where no split was asked for.

    Raises:
        PipelineError: the split is missing, is the artifact's own, or has other classes.
    """
    name = settings.report_split
    if name is None:
        return None
    if name == settings.data.split:
        raise PipelineError(
            f"--report-split {name}: is the split that is embedded, so nothing would be unseen. Name another, or leave "
            "the option out: a fifth of the images is then held out."
        )
    data = load_labelled(settings.data.model_copy(update={"split": name}))
    row_of = {class_name: row for row, class_name in enumerate(class_names)}
    present = [data.class_names[index] for index in np.unique(data.labels).tolist()]
    unknown = [class_name for class_name in present if class_name not in row_of]
    if unknown:
        raise PipelineError(
            f"--report-split {name}: {len(unknown)} of its classes are not among those that are embedded "
            f"({listed(unknown)}). Choose another split, or extract all classes."
        )
    rows = np.array([row_of.get(class_name, -1) for class_name in data.class_names])
    return replace(data, labels=rows[data.labels], class_names=tuple(class_names))


def evaluation_embedder(embedder: Embedder, data: Labelled) -> Embedder:
    """Return what embeds the images to measure on as the artifact's are, but in one view.

    Args:
        embedder: of the artifact.
        data: the images to measure on; a random choice where they are more than are measured on.

    Returns:
        The embedder.
    """
    rows = np.arange(len(data))
    if len(rows) > MAX_HELD_OUT:
        rows = np.sort(np.random.default_rng(0).choice(rows, MAX_HELD_OUT, replace=False))
    return replace(
        embedder,
        settings=embedder.settings.model_copy(update={"samples": False, "views": 1}),
        data=data,
        rendering=replace(embedder.rendering, views=1),
        plan=make_plan(rows, embedder.batch_size, chunk_dtype(1, embedder.teacher.info.embed_dim).itemsize),
        what=f"embedding {data.settings.split}",
    )
