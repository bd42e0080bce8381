"""Measure extraction against what the machine and transformers can do, and try what it promises.

    python benchmarks/extract.py --work runs/extract [--only NAME]… [--device cpu|cuda] [--images N]

Speed is compared in one process, the two sides in turn, medians over pairs; promises are tried on the command, in
processes of its own. It needs a folder with `data/cifar100` and `teachers/`, by default ../shared; CLIP_EMBED_KD_SHARED
names another. With --device cuda it makes its own: JPEG files, and a ViT-B/16 of random weights. Linux only.
A check or a target that is false makes it exit 1, once everything is written; a trial (--images) has no targets.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import extract_assembly, made_inputs
from benchmarks.extract_processes import Alone, Killer, Outcome, contents, run, watch
from benchmarks.extract_setup import ROOT, Setup, choose_setup, fresh_folder, machine
from benchmarks.extract_speed import (
    bare_forward,
    in_turn,
    least_cosine,
    make_bench_embedder,
    rate_of_extraction,
    rate_of_pipeline,
)
from benchmarks.figure_book import FigureBook, Figures
from pipeline.extract.preparation import BATCH_SIZES as DEFAULT_BATCH_SIZES
from pipeline.runtime import Precision, keep_freed_memory, resolve_device, resolve_precision

FORWARD_IMAGES = {"cpu": 256, "cuda": 8192}  # few on a CPU: pairs follow each other before the machine changes
PIPELINE_IMAGES = {"cpu": 256, "cuda": 2048}
RATED_IMAGES = {"cpu": 1024, "cuda": 8192}
KILLED_IMAGES, SHARED_IMAGES = 1536, 2560  # two and three chunks
FEW_IMAGES, MANY_IMAGES = 10_000, 50_000
ASSEMBLED_IMAGES = (250_000, 1_000_000)
BATCH_SIZES, ROUNDS = (8, 16, 32, 64, 128), 3
KNOWN_PERCENT = {"nearest_mean": 67.0, "ridge": 68.5}  # ViT-Ti/16 on the test split of CIFAR-100
IDLE = "import torch; print(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])"


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="folder for artifacts and figures; one a machine"
)
@click.option("--only", multiple=True, metavar="NAME", help="measure these only, and keep the other figures")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("--made", is_flag=True, help="made images and teacher, as with --device cuda")
@click.option("--teacher", type=click.Path(path_type=Path), help="another teacher's folder")
@click.option("--dataset", type=click.Path(path_type=Path), help="another data set's folder")
@click.option("--label-column", default="fine_label", show_default=True, help="of --dataset")
@click.option("--images", type=click.IntRange(min=1), help="a trial: at most so many images each")
@click.option("--pairs", default=15, show_default=True, help="how often two speeds are compared")
@click.option("--kills", default=20, show_default=True, help="processes to kill")
def main(only: tuple[str, ...], **options: Any) -> None:
    """Print every figure and write them to WORK/extract.json."""
    if unknown := set(only) - set(MEASURES):
        raise click.UsageError(f"--only {', '.join(sorted(unknown))}: expected {', '.join(MEASURES)}")
    setup = choose_setup(**options)
    of, facts = setup.described(), machine(setup.device)
    book = FigureBook(setup.work / "extract.json", facts, of, is_trial=setup.images is not None)
    for name in only or usual_measures(setup):
        book.measure(name, partial(MEASURES[name], setup))
    book.finish()


def measure_forward(setup: Setup) -> Figures:
    """Extract images, and run the bare teacher as often over one batch that lies preprocessed on its device.

    Both at the command's batch size, in each precision. Extraction counts its embedding phase: reading, decoding, keys,
    preprocessing, the teacher, chunks written to disk; neither the start of the process nor the report card.
    """
    images, aim = setup.count(FORWARD_IMAGES[setup.device_type]), 0.95 if setup.device_type == "cpu" else 0.9
    figures: Figures = {"images": images, "targets": {}}
    keep_freed_memory()  # as the command does; the bare teacher gains as much
    for name in precisions(setup):
        embedder = make_bench_embedder(setup, name, images)
        figures["batch size"] = embedder.batch_size
        figures[name] = in_turn(rate_of_extraction(setup, embedder), bare_forward(embedder), setup.pairs)
        figures["targets"][f"{name}: at least {aim}"] = figures[name]["ratio"] >= aim
    return figures


def measure_pipeline(setup: Setup) -> Figures:
    """Extract images, and give the same ones, as the data set decodes them, to transformers' pipeline.

    At equal precision and batch size, where the pipeline returns tensors; and at the defaults of both (the pipeline's:
    float32, one image at a time, nested lists). The pipeline gains, too, from the memory that extraction lets the
    process keep. The teacher must have a [CLS] token, which is compared on a few images.
    """
    images = setup.count(PIPELINE_IMAGES[setup.device_type])
    figures: Figures = {
        "images": images,
        "batch size": DEFAULT_BATCH_SIZES[setup.device_type],
        "checks": {},
        "targets": {},
    }
    cases: list[tuple[str, Precision, Figures, float]] = [
        (
            f"both in {name}",
            name,
            {"dtype": getattr(torch, name), "batch_size": DEFAULT_BATCH_SIZES[setup.device_type]},
            1.0,
        )
        for name in precisions(setup)
    ]
    for case, precision, options, aim in [*cases, ("defaults of both", "auto", {}, 2.2)]:
        model = {"model": str(setup.teacher), "device": setup.device}
        extractor = transformers.pipeline("image-feature-extraction", **model, **options)
        cosine = least_cosine(setup, extractor, precision)
        reference = rate_of_pipeline(setup, extractor, images, as_tensors=bool(options))
        ours = rate_of_extraction(setup, make_bench_embedder(setup, precision, images))
        figures[case] = in_turn(ours, reference, max(3, setup.pairs // 2))
        figures[case]["least cosine"] = round(cosine, 6)
        figures["checks"][f"{case}: cosine above 0.999"] = cosine > 0.999
        figures["targets"][f"{case}: at least {aim}"] = figures[case]["ratio"] >= aim
    return figures


def measure_kill(setup: Setup) -> Figures:
    """Kill processes at random moments, once or twice each, then let them finish; compare with one left alone.

    In turn by SIGKILL and SIGTERM. Half of the first moments lie anywhere in the length of the run that was left alone;
    the other half in its embedding phase, since of a short run much is imports. The same command goes on. All
    files in the folder count.
    """
    images = setup.count(KILLED_IMAGES)
    options = ["--per-class", "all", "--samples", "--limit", str(images)]
    out = fresh_folder(setup.work / "kill") / "a.safetensors"
    start = time.monotonic()
    told = run(setup.command(out, *options))
    alone = Alone(contents(out.parent), time.monotonic() - start, images / told["images_per_second"])
    outcomes: list[Outcome] = []
    num_missed, chance = 0, random.Random(0)
    while len(outcomes) < setup.kills and num_missed <= setup.kills:
        turn = len(outcomes)
        killer = Killer((signal.SIGKILL, signal.SIGTERM)[turn % 2], alone, chance)
        fresh_folder(out.parent)
        outcome = killer.kill(setup.command(out, *options), out, in_embedding=turn // 2 % 2 == 0)
        if outcome.killed_in:
            outcomes.append(outcome)
            click.echo(f"{turn + 1} of {setup.kills}: {outcome}", err=True)
        num_missed += not outcome.killed_in
    return {
        "images": images,
        "seconds left alone": round(alone.seconds, 1),
        "finished before the signal": num_missed,
        **{number.name: sum_of_kills(outcomes, number) for number in (signal.SIGKILL, signal.SIGTERM)},
        "checks": {
            "enough were killed": len(outcomes) == setup.kills,
            "all files equal, and no other": not any(outcome.differing for outcome in outcomes),
            "no damaged artifact in between": not any(outcome.num_damaged for outcome in outcomes),
            "no other exit": not any(outcome.odd_exits for outcome in outcomes),
        },
    }


def sum_of_kills(outcomes: list[Outcome], number: signal.Signals) -> Figures:
    """Count what became of the processes that a signal killed."""
    chosen = [outcome for outcome in outcomes if outcome.number == number]
    return {
        "processes": len(chosen),
        "killed in": dict(Counter(phase for outcome in chosen for phase in outcome.killed_in)),
        "artifacts equal": sum("a.safetensors" not in outcome.differing for outcome in chosen),
        "folders equal": sum(not outcome.differing for outcome in chosen),
        "files that differ": sorted({name for outcome in chosen for name in outcome.differing}),
        "images not embedded again": [outcome.num_resumed for outcome in chosen if outcome.num_resumed is not None],
    }


def measure_processes(setup: Setup) -> Figures:
    """Run one command alone, and shared by two processes under torchrun, one thread each; compare the bytes."""
    images, environment = setup.count(SHARED_IMAGES), os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--per-class", "all", "--samples", "--limit", str(images)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    seconds, made = [], []
    for number in (1, 2):
        folder = fresh_folder(setup.work / f"processes-{number}")
        start = time.monotonic()
        command = setup.command(folder / "a.safetensors", *options)
        run(command if number == 1 else [*launcher, str(number), *command], environment)
        seconds.append(time.monotonic() - start)
        made.append(contents(folder))
    checks = {name: content == made[1].get(name) for name, content in made[0].items()}
    return {
        "images": images,
        "seconds of one, of two": [round(each, 1) for each in seconds],
        "checks": {"no other file": set(made[0]) == set(made[1]), **{f"same {name}": checks[name] for name in checks}},
    }


def measure_memory(setup: Setup) -> Figures:
    """Watch processes that store the samples of few images, and of five times as many; report card included.

    Anonymous memory is what a process cannot give back. Mapped file pages, libraries and chunks, are the kernel's to
    drop, and stated apart. The teacher is tiny and random: what is measured is all that is not the teacher.
    """
    many = setup.count(MANY_IMAGES)
    few = setup.count(many * FEW_IMAGES // MANY_IMAGES)
    teacher = made_inputs.tiny_teacher(setup.work)
    idle = subprocess.run([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: Figures = {"teacher": teacher.name, "idle with torch, anonymous MB": round(int(idle) / 1e3, 1)}
    peaks = []
    for images in (few, many):
        out = fresh_folder(setup.work / "memory") / "a.safetensors"
        peak, _ = watch(setup.command(out, "--samples", "--limit", str(images), teacher=teacher))
        figures[f"{images} images"] = {f"{name} MB": round(value / 1e3, 1) for name, value in peak.items()}
        figures[f"{images} images"]["artifact MB"] = round(out.stat().st_size / 1e6, 1)
        peaks.append(peak["anonymous"])
    above_idle = (peaks[1] - int(idle)) / (peaks[0] - int(idle))
    figures |= {"ratio": round(peaks[1] / peaks[0], 3), "ratio above idle": round(above_idle, 3)}
    return figures | {"targets": {"ratio at most 1.05": peaks[1] <= 1.05 * peaks[0]}}


def measure_report(setup: Setup) -> Figures:
    """Let the report card measure the teacher on the test split, and compare with what is known of it."""
    out = fresh_folder(setup.work / "report") / "a.safetensors"
    limit = ["--limit", str(setup.images)] if setup.images else []
    card = run(setup.command(out, "--per-class", "50", "--report-split", "test", *limit))["report_card"]
    figures: Figures = {name: card[name] for name in ("num_images", "held_out_from", "num_held_out")}
    figures["checks"] = {"measured on the test split": card["held_out_from"] == "evaluation"}
    figures["targets"] = {"10000 images": card["num_held_out"] == 10_000}
    for name, known in KNOWN_PERCENT.items():
        percent = 100 * card[name]["share"]
        figures[name] = {"percent": round(percent, 2), "known percent": known}
        figures["targets"][f"{name} within two points"] = abs(percent - known) <= 2
    return figures


def measure_rates(setup: Setup) -> Figures:
    """Extract with samples at several batch sizes in turn: images/s, medians over rounds, and bytes an image."""
    images = setup.count(RATED_IMAGES[setup.device_type])
    bare_bytes = setup.extract(images).artifact_bytes  # and a warm-up
    rates: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    for turn in range(ROUNDS):
        for size in BATCH_SIZES[turn:] + BATCH_SIZES[:turn]:
            result = setup.extract(images, samples=True, batch_size=size)
            rates[size].append(result.images_per_second)
    return {
        "images": images,
        "precision": result.manifest.teacher.precision,
        "images/s": {size: round(statistics.median(each), 1) for size, each in rates.items()},
        "least and most images/s": {size: [round(min(each), 1), round(max(each), 1)] for size, each in rates.items()},
        "bytes without samples": bare_bytes,
        "bytes an image with samples": round((result.artifact_bytes - bare_bytes) / images, 1),
    }


def measure_assembly(setup: Setup) -> Figures:
    """Make artifacts of chunks of numbers, 768 values an image: seconds, and memory for each image more.

    What follows when the last image is embedded, but for the report card, which looks at 20,000 images at most.
    """
    counts = [min(number, setup.images or number) for number in ASSEMBLED_IMAGES]
    figures: Figures = {"embedding values": extract_assembly.EMBED_DIM, "classes": extract_assembly.NUM_CLASSES}
    peaks = []
    for images in counts:
        folder = fresh_folder(setup.work / "assembly")
        extract_assembly.make_chunks(folder, images)
        peak, told = watch([str(ROOT / "benchmarks" / "extract_assembly.py"), str(folder)])
        seconds = {f"{name}, seconds": round(value, 1) for name, value in told.items()}
        figures[f"{images} images"] = {**{f"{name} MB": round(kb / 1e3, 1) for name, kb in peak.items()}, **seconds}
        peaks.append(peak["anonymous"])
    fresh_folder(setup.work / "assembly")
    return figures | {"bytes for each image more": round(1024 * (peaks[1] - peaks[0]) / max(1, counts[1] - counts[0]))}


MEASURES: dict[str, Callable[[Setup], Figures]] = {
    "forward": measure_forward,
    "pipeline": measure_pipeline,
    "kill": measure_kill,
    "processes": measure_processes,
    "memory": measure_memory,
    "report": measure_report,
    "rates": measure_rates,
    "assembly": measure_assembly,
}


def usual_measures(setup: Setup) -> list[str]:
    """Name the measures that make sense: promises hold on any device, accuracies are known of one teacher."""
    if setup.device_type == "cuda":
        return ["forward", "pipeline", "rates"]
    return [name for name in MEASURES if name != "report" or setup.is_known]


def precisions(setup: Setup) -> list[Precision]:
    """Name the precision that is chosen by itself, and float32 where that is another."""
    chosen = resolve_precision("auto", resolve_device(setup.device))
    return ["bfloat16", "float32"] if chosen == torch.bfloat16 else ["float32"]


if __name__ == "__main__":
    main()
