"""Train a student by a method that the paper compares itself with, everything else being equal to `distill`.

    python benchmarks/baselines.py --method teacher-kd --artifact A --teacher T --out RUN

`teacher-kd` is the paper's CLIP-Teacher-KD: a forward pass of the teacher on every batch, in-batch contrast with its
embeddings. `logits` is typical distillation: soft labels of the live teacher, through the artifact's ridge head.
`released` has the arithmetic of the paper's released loop, with the artifact's class embeddings. `supervised` has no
teacher. Data and teacher lie by default in ../shared; CLIP_EMBED_KD_SHARED names another folder.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.baseline_methods import METHODS, arrange, method_overrides
from benchmarks.distill_loops import LABEL_COLUMN
from benchmarks.extract_setup import KNOWN_DATA
from benchmarks.live_teacher import load_live_teacher
from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings
from pipeline.distill.evaluate import Evaluation
from pipeline.distill.loop import Trainer
from pipeline.distill.preparation import compute_for, prepare
from pipeline.distill.recipe import load_recipe, parse_overrides
from pipeline.distill.record import RunDirectory
from pipeline.distill.run import found_for_run, told_of_run
from pipeline.distill.training import Limits, Training
from pipeline.errors import PipelineError, describe_problems
from pipeline.progress import duration, log_to_stderr, size
from pipeline.runtime import PeakMemory, keep_freed_memory, peak_memory
from store import Artifact, StoreError, open_artifact

_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class BaselineResult:
    """What a run of a method made and what it took.

    `accuracy` (top-1) and `top5` in percent, of the last epoch. `train_seconds`, and the `teacher_seconds` in them, are
    of all parts of a run that was gone on with. `teacher` is the artifact's,
    `compiled` whether steps were.
    """

    method: str
    recipe: str
    artifact: str
    teacher: str
    student: str
    image_size: int
    epochs: int
    seed: int
    accuracy: float
    top5: float
    num_steps: int
    train_seconds: float
    teacher_seconds: float
    images_per_second: float
    compiled: bool
    memory: PeakMemory
    device: str
    precision: str
    run_directory: str

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line for people."""
        teacher = f", {duration(self.teacher_seconds)} of it in the teacher" if self.teacher_seconds else ""
        training = f"{self.num_steps:,} steps, {self.images_per_second:.1f} images/s, {duration(self.train_seconds)}"
        rows = [
            ("method", f"{self.method}, recipe {self.recipe}, {self.precision} on {self.device}"),
            ("student", f"{self.run_directory}/student"),
            ("accuracy", f"top-1 {self.accuracy:.2f} %, top-5 {self.top5:.2f} %"),
            ("training", training + teacher),
            ("memory", f"{size(self.memory.resident_bytes)} at the peak, libraries included"),
        ]
        return rows + [("GPU memory", f"{size(self.memory.device_bytes)} at the peak")] * bool(self.memory.device_bytes)


def train_baseline(settings: DistillSettings, name: str, teacher_name: str | None) -> BaselineResult:
    """Train a student by a method.

    Args:
        settings: of the run; its overrides are those of the method.
        name: of the method.
        teacher_name: hub name or folder, for a method that needs a live teacher.

    Returns:
        Figures.

    Raises:
        PipelineError: anything a user can cause; a run directory stays only where a run can be gone on with.
        StoreError: the artifact is missing, damaged or not one.
    """
    keep_freed_memory()
    recipe, compute = load_recipe(settings.recipe, settings.overrides), compute_for(settings)
    directory = RunDirectory(settings.out, overwrite=settings.overwrite, resume=settings.resume)
    with ExitStack() as stack:
        artifact = stack.enter_context(open_artifact(settings.artifact))
        told = told_of_run(settings, recipe, artifact, compute)
        told["settings"] |= {"method": name, "target": METHODS[name].target}
        stack.enter_context(directory.claim(told))
        teacher = None if teacher_name is None else load_live_teacher(teacher_name, artifact, settings)
        prepared = prepare(settings, recipe, compute, artifact)
        trainer, batches = arrange(prepared, name, teacher)
        with directory.open(found_for_run(prepared), trainer):
            # Once, after the last epoch.
            limits = Limits(settings.max_steps, settings.checkpoint_minutes, evaluate_every=recipe.epochs)
            evaluation = Training(trainer, batches, prepared.images.evaluation, directory).run(limits)
            result = _result(settings, name, artifact, trainer, evaluation)
            directory.note({"result": asdict(result) | {"run_directory": settings.out.name}})
            directory.finish()
    return result


def _result(
    settings: DistillSettings, name: str, artifact: Artifact, trainer: Trainer, evaluation: Evaluation
) -> BaselineResult:
    progress, compute = trainer.progress, trainer.compute
    return BaselineResult(
        method=name,
        recipe=settings.recipe,
        artifact=artifact.path.name,
        teacher=artifact.manifest.teacher.name,
        student=settings.student,
        image_size=settings.image_size,
        epochs=trainer.recipe.epochs,
        seed=settings.seed,
        accuracy=evaluation.top1,
        top5=evaluation.top5,
        num_steps=progress.num_steps,
        train_seconds=progress.seconds,
        # The seconds of a live feed are the teacher's; another feed's are not.
        teacher_seconds=progress.feed_seconds if METHODS[name].is_live else 0.0,
        images_per_second=progress.num_images / max(progress.seconds, 1e-9),
        compiled=trainer.forward_backward.compiled,
        memory=peak_memory(compute.device),
        device=compute.device.type,
        precision=str(compute.precision).removeprefix("torch."),
        run_directory=str(settings.out),
    )


def baseline_settings(name: str, options: dict[str, Any]) -> DistillSettings:
    """Make settings of a run from the command's options.

    Args:
        name: of the method.
        options: as they were given, those of the data and of the recipe among them.

    Returns:
        The settings.

    Raises:
        PipelineError: a setting is not one, or not the method's.
        ValidationError: a value is out of its range.
    """
    data = DataSettings(**{key: options.pop(key) for key in ("dataset", "label_column", "limit")})
    overrides, epochs = parse_overrides(options.pop("changes")), options.pop("epochs")
    overrides |= {} if epochs is None else {"epochs": epochs}
    only = METHODS[name].precision
    if only and options["precision"] not in ("auto", only):
        raise PipelineError(f"--precision {options['precision']}: method {name} computes in {only}. Leave it out.")
    options["precision"] = only or options["precision"]
    return DistillSettings(data=data, overrides=method_overrides(name, overrides), **options)


@click.command()
@click.option("--method", required=True, type=click.Choice(list(METHODS)), help="how the student learns")
@click.option("--artifact", required=True, type=_PATH, help="what extract wrote: classes, their means, ridge head")
@click.option("--teacher", help="the artifact's teacher, by hub name or folder; for teacher-kd and logits")
@click.option("--dataset", default=str(KNOWN_DATA), show_default=True, help="hub name, or a folder")
@click.option("--label-column", default=LABEL_COLUMN, show_default=True, help="column of the labels")
@click.option("--limit", type=click.IntRange(min=1), help="train on this many images, of all classes in turn")
@click.option("--out", required=True, type=_PATH, help="run directory to make")
@click.option("--student", default="base", show_default=True, help="base, large, or any timm model")
@click.option(
    "--image-size", type=click.IntRange(min=1), default=32, show_default=True, help="of the student, in pixels"
)
@click.option("--recipe", default="paper", show_default=True, help="a recipe's name, or a TOML file")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="any setting of the recipe; may be repeated")
@click.option("--epochs", type=click.IntRange(min=1), help="passes over the images  [default: the recipe's]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="of all that is random")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N, of student and teacher")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="arithmetic of student and teacher; auto: bfloat16 where the hardware has it; released: float32",
)
@click.option("--micro-batch", type=click.IntRange(min=2), help="images in the student at once  [default: the batch]")
@click.option("--compile/--no-compile", default=False, help="compile the student's step")
@click.option("--max-steps", type=click.IntRange(min=1), help="stop after so many steps")
@click.option("--resume", is_flag=True, help="go on with the run in the run directory, if there is one")
@click.option("--overwrite", is_flag=True, help="replace an existing run directory")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def main(method: str, teacher: str | None, as_json: bool, **options: Any) -> None:
    """Train a student, and print its accuracy and what it took."""
    log_to_stderr()
    if not METHODS[method].is_live:
        teacher = None
    elif teacher is None:
        raise click.UsageError(f"--method {method} runs a teacher: pass --teacher, the one that made the artifact.")
    try:
        result = train_baseline(baseline_settings(method, options), method, teacher)
    except ValidationError as error:
        raise click.UsageError(describe_problems(error)) from None
    except (PipelineError, StoreError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
        return
    for label, text in result.rows():
        click.echo(f"{label:<10}  {text}")


if __name__ == "__main__":
    main()
