"""Time and memory of one training step with one of the paper's teachers, or without one: Fig. 2, Tables I and II.

    python benchmarks/resources.py --student base --image-size 32 --teacher vit-large-patch32 --method embed --steps 20

Teachers have random weights: speed and memory are those of trained ones. `--steps 0` counts weights and makes none.
Linux only.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distill_memory import IDLE
from benchmarks.extract_processes import watch
from benchmarks.resources_step import NUM_CLASSES, StepCase, make_student
from benchmarks.vit_teachers import ModelSize, teacher_size
from pipeline.distill.recipe import load_recipe
from pipeline.distill.student import Student
from pipeline.errors import PipelineError
from pipeline.progress import duration, size
from pipeline.runtime import resolve_device, resolve_precision

EPOCH_IMAGES = 50_000  # of CIFAR-100
_FLOAT32_BYTES = 4


def count(student_name: str, image_size: int, teacher_name: str) -> dict[str, Any]:
    """Count what must lie in memory for training: weights, all as float32, as the paper has them.

    Args:
        student_name: `base` or `large`.
        image_size: of the student.
        teacher_name: one of the paper's.

    Returns:
        `sizes` as Table I has them, `weight_bytes` of teacher, student, projection and class embeddings, and as
        `weight_ratio` the first over the sum of the others: the paper's 17× and 59×.

    Raises:
        PipelineError: the teacher is not one of the paper's, or the student does not take images of this size.
    """
    teacher, student = teacher_size(teacher_name), make_student(student_name, image_size)
    projection = nn.Linear(teacher.width, student.embed_dim, device="meta")
    numbers = {
        "teacher": teacher.parameters,
        "student": _parameters(student),
        "projection": _parameters(projection),
        "class_means": NUM_CLASSES * teacher.width,
    }
    others = sum(number for name, number in numbers.items() if name != "teacher")
    return {
        "sizes": {"student": asdict(_student_size(student)), "teacher": asdict(teacher)},
        "weight_bytes": {name: _FLOAT32_BYTES * number for name, number in numbers.items()},
        "weight_ratio": round(numbers["teacher"] / others, 3),
    }


def measure(case: StepCase) -> dict[str, Any]:
    """Take a case's steps in a process of its own, and watch it.

    Args:
        case: of one step at least.

    Returns:
        `ms_per_step` (median), images/s, seconds of an epoch; as `memory_bytes` what PyTorch allocated on a GPU, else
        anonymous memory above an idle process that has imported torch, mapped file pages apart. Times are of steps: the
        batch lies on the device beforehand.
    """
    idle, _ = watch(["-c", IDLE])
    script = Path(__file__).with_name("resources_step.py")
    peaks, told = watch([str(script), json.dumps(asdict(case))])
    seconds, batch_size = statistics.median(told["seconds"]), load_recipe("paper").batch_size
    return {
        "ms_per_step": round(1e3 * seconds, 3),
        "images_per_second": round(batch_size / seconds, 2),
        "epoch_seconds": round(EPOCH_IMAGES * seconds / batch_size, 2),
        "memory_bytes": told["device_bytes"] or 1024 * (peaks["anonymous"] - idle["anonymous"]),
        "file_page_bytes": 1024 * peaks["file pages"],
    }


def _student_size(student: Student) -> ModelSize:
    model: Any = student.model
    block = model.blocks[0]
    return ModelSize(
        layers=len(model.blocks),
        width=student.embed_dim,
        heads=block.attn.num_heads,
        mlp=block.mlp.fc1.out_features,
        parameters=_parameters(student),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lines(told: dict[str, Any]) -> list[str]:
    """Write the result for people."""
    lines = [f"{'':<8} layers  width  heads   MLP   parameters"]
    for name, row in told["sizes"].items():
        numbers = f"{row['layers']:>6} {row['width']:>6} {row['heads']:>6} {row['mlp']:>5}"
        lines.append(f"{name:<8} {numbers}  {row['parameters']:>11,}")
    weights = ", ".join(f"{name.replace('_', ' ')} {size(found)}" for name, found in told["weight_bytes"].items())
    lines.append(f"weights  {weights}: {told['weight_ratio']:.1f} times as much in the teacher as in the rest")
    if told["steps"]:
        lines += [
            f"step     {told['ms_per_step']:,.1f} ms, {told['images_per_second']:,.1f} images/s, "
            f"{duration(told['epoch_seconds'])} for {EPOCH_IMAGES:,} images",
            f"memory   {size(told['memory_bytes'])} at the peak, in {told['precision']} on {told['device']}",
        ]
    return lines


@click.command()
@click.option("--student", type=click.Choice(["base", "large"]), default="base", show_default=True, help="of Table I")
@click.option(
    "--image-size", type=click.IntRange(min=4), default=32, show_default=True, help="of the student, in pixels"
)
@click.option("--teacher", required=True, help="vit-SIZE-patchP: SIZE base or large, P 16 or 32; or its hub name")
@click.option(
    "--method",
    type=click.Choice(["embed", "teacher", "supervised"]),
    default="embed",
    show_default=True,
    help="class embeddings, a live teacher, or labels alone",
)
@click.option(
    "--steps", type=click.IntRange(min=0), default=20, show_default=True, help="to time; 0: only count weights"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="of student and teacher; auto: bfloat16 where the hardware has it",
)
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def main(teacher: str, as_json: bool, **options: Any) -> None:
    """Print the size of teacher and student, and what a step takes."""
    try:
        told = {"teacher": teacher, **options, **count(options["student"], options["image_size"], teacher)}
        if told["steps"]:
            device = resolve_device(options["device"])
            told["device"] = device.type
            told["precision"] = str(resolve_precision(options["precision"], device)).removeprefix("torch.")
            told |= measure(StepCase(teacher=teacher, embed_dim=told["sizes"]["teacher"]["width"], **options))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    except subprocess.CalledProcessError as error:  # it said why
        sys.exit(error.returncode)
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(_lines(told)))


if __name__ == "__main__":
    main()
