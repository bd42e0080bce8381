"""Fine-tune a teacher on a data set, so that what is extracted from it knows the data's classes.

    python benchmarks/finetune_teacher.py --teacher T --dataset D --label-column fine_label --out FINE
    clip-embed-kd extract --teacher FINE --dataset D --label-column fine_label --samples --out A.safetensors

All of the teacher learns, with a new linear classifier on the embedding that `extract` takes. Images are decoded once
and lie on the GPU where they fit, and are augmented and resized there. The evaluation split is looked at once, at the
end; settings are chosen with `--holdout`, which leaves a tenth of the training images out and evaluates on them.

Ctrl-C and SIGTERM make it stop after a checkpoint, `--max-minutes` too (exit status 3): the same command goes on, from
`.OUT.partial` beside OUT. OUT appears when all is done.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.extract_setup import KNOWN_DATA, machine
from benchmarks.finetune_images import DeviceImages
from benchmarks.finetune_model import TeacherClassifier
from benchmarks.finetune_setup import RECORD, FinetuneSettings, Setup, set_up
from benchmarks.finetune_training import FineTuning
from pipeline.data import DataSettings
from pipeline.distill.checkpoint import Checkpoints
from pipeline.errors import PipelineError
from pipeline.extract.partial import PartialFolder
from pipeline.output import sync, write_atomically
from pipeline.progress import LOGGER, duration, log_to_stderr, size
from pipeline.runtime import keep_freed_memory, peak_memory, software_versions

UNFINISHED = 3  # exit status
_SOFTWARE = ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow", "safetensors")
_PATH = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--teacher", required=True, metavar="T", help="transformers image encoder: hub name or folder")
@click.option("--dataset", metavar="D", help="hub name, or a folder  [default: CIFAR-100 in the shared folder]")
@click.option("--split", default="train", help="split to train on")
@click.option("--image-column", metavar="NAME", help="found where only one fits")
@click.option("--label-column", metavar="NAME", help="found where only one fits; fine_label where no D is given")
@click.option("--limit", type=click.IntRange(min=1), help="train on this many images, of all classes in turn")
@click.option("--out", required=True, type=_PATH, help="folder of the fine-tuned teacher to make")
@click.option("--epochs", type=click.IntRange(min=1), default=3, help="passes over the images")
@click.option("--batch-size", type=click.IntRange(min=2), default=128, help="images a step")
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(0, min_open=True),
    default=5e-5,
    help="the encoder's highest learning rate; the classifier's is ten times as high",
)
@click.option("--operations", type=click.IntRange(0, 14), default=1, help="of TrivialAugment on each image")
@click.option(
    "--image-size",
    type=click.IntRange(min=8),
    help="side of decoded images, px  [default: the data's, ≤ the teacher's]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="of order, augmentation and dropout")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="of the passes")
@click.option(
    "--eval-split", metavar="NAME", help="split to evaluate on  [default: test, else validation, else a tenth]"
)
@click.option("--holdout", is_flag=True, help="evaluate on a tenth of the training images, held out by content")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="then stop after a checkpoint, exit 3")
@click.option("--skip-bad", is_flag=True, help="leave out and count images that cannot be decoded")
@click.option("--cache", type=_PATH, metavar="DIR", help="where decoded images are kept")
@click.option("--overwrite", is_flag=True, help="replace an existing fine-tuned teacher")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def main(as_json: bool, max_minutes: float | None, **options: Any) -> None:
    """Fine-tune a teacher on a data set."""
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    if options["dataset"] is None:
        options |= {"dataset": str(KNOWN_DATA), "label_column": options["label_column"] or "fine_label"}
    if options["holdout"] and options["eval_split"] is not None:
        raise click.UsageError("--holdout does not go with --eval-split: it evaluates on training images.")
    log_to_stderr()
    keep_freed_memory()
    names = ("dataset", "split", "image_column", "label_column", "limit")
    data = DataSettings(**{name: options.pop(name) for name in names})
    with _errors_as_lines():
        result = finetune(FinetuneSettings(data=data, **options), deadline)
    if result is None:
        sys.exit(UNFINISHED)
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else _told(result))


def finetune(settings: FinetuneSettings, deadline: float | None = None) -> dict[str, Any] | None:
    """Fine-tune a teacher, or go on with it.

    Args:
        settings: of the fine-tuning.
        deadline: when to stop, by `time.monotonic()`.

    Returns:
        What came out of it, as plain JSON; none where time was up before the end.

    Raises:
        PipelineError: anything a user can cause.
        SystemExit: asked to stop, after a checkpoint.
        KeyboardInterrupt: the same by Ctrl-C.
    """
    setup = set_up(settings)
    computer = machine(str(setup.compute.device))
    model = TeacherClassifier(setup.teacher, len(setup.data.class_names))
    with _unfinished(setup) as partial:
        model.check_saves(setup.data.class_names, _emptied(partial.path / "trial"))
        shutil.rmtree(partial.path / "trial")
        training = FineTuning(model, setup)
        checkpoints = Checkpoints(partial.path / "checkpoints")
        _restore(checkpoints, training, settings)
        if not training.run(checkpoints, deadline):
            LOGGER.info("%s: time is up. The same command goes on from %s.", settings.out, partial.path)
            return None
        evaluated = DeviceImages(setup.evaluated, setup.compute.device)
        result = _result(setup, training, training.evaluate(evaluated))
        record = {**_record(setup), "result": result, "software": software_versions(_SOFTWARE), "machine": computer}
        folder = _emptied(partial.path / "teacher")
        model.save(setup.data.class_names, folder)
        write_atomically(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        _publish(folder, settings.out.resolve())
        partial.remove()
    return {"teacher": settings.teacher, "out": str(settings.out), **result}


@contextmanager
def _unfinished(setup: Setup) -> Iterator[PartialFolder]:
    """Open the folder of what is not finished; if nothing was learnt in it, it goes again."""
    out = setup.settings.out.resolve()  # it may be a link
    partial = PartialFolder(out.with_name(f".{out.name}.partial"), "fine-tuning")
    try:
        partial.open(setup.decides(), overwrite=setup.settings.overwrite)
        yield partial
    finally:
        if partial.is_open and not any((partial.path / "checkpoints").glob("[0-9]*")):
            partial.remove()
        partial.close()


def _restore(checkpoints: Checkpoints, training: FineTuning, settings: FinetuneSettings) -> None:
    try:
        if checkpoints.restore(training):
            done = training.progress.num_steps
            LOGGER.info("Going on after step %s, in epoch %d.", f"{done:,}", training.progress.epoch)
    except PipelineError:  # all are damaged
        if not settings.overwrite:
            raise
        shutil.rmtree(checkpoints.folder)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _publish(folder: Path, out: Path) -> None:
    for path in (*folder.iterdir(), folder):
        sync(path)
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)


def _result(setup: Setup, training: FineTuning, accuracies: tuple[float, float]) -> dict[str, Any]:
    """Return what came out; accuracies are in percent, seconds of the steps alone."""
    memory, progress = peak_memory(setup.compute.device), training.progress
    return {
        "epochs": setup.settings.epochs,
        "seed": setup.settings.seed,
        "accuracy": accuracies[0],
        "top5": accuracies[1],
        "evaluated_on": setup.evaluated_on,
        "num_images": {"train": len(setup.train), "evaluation": len(setup.evaluated)},
        "train_seconds": progress.seconds,
        "images_per_second": progress.num_images / progress.seconds,
        "memory": {"resident_bytes": memory.resident_bytes, "device_bytes": memory.device_bytes},
    }


def _record(setup: Setup) -> dict[str, Any]:
    data = {"name": setup.data.name, "revision": setup.data.revision, "licence": setup.data.licence}
    told = setup.data.settings.model_dump(include={"split", "limit"})
    told |= {"image_column": setup.data.image_column, "label_column": setup.data.label_column}
    return {"teacher": setup.teacher.info.model_dump(), "data": {**data, **told}, "settings": setup.decides()}


def _told(result: dict[str, Any]) -> str:
    memory = result["memory"]
    rows = {
        "teacher": result["out"],
        "accuracy": f"top-1 {result['accuracy']:.2f} %, top-5 {result['top5']:.2f} % ({result['evaluated_on']})",
        "time": f"{duration(result['train_seconds'])} of training, {result['images_per_second']:.1f} images/s",
        "memory": f"{size(memory['resident_bytes'])} at the peak, {size(memory['device_bytes'])} on the GPU",
    }
    return "\n".join(f"{label:<8}  {text}" for label, text in rows.items())


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    try:
        yield
    except PipelineError as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'input or output'}: {error.strerror or error}.") from None
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
