"""The commands on artifacts: `store inspect`, `verify`, `convert`, `merge` and `plot`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import (
    PATH,
    example,
    json_option,
    overwrite_option,
    version_option,
)
from pipeline.commands.printing import as_json_text, byte_progress, emit, explain

_gzip_option = click.option("--gzip", is_flag=True, help="compress samples, for cold storage; .h5 only")


@click.group()
@version_option
def store() -> None:
    """Look into artifacts, check them, and make others of them."""


@store.command(epilog=example("clip-embed-kd store inspect cifar100.safetensors"))
@click.argument("artifact", type=PATH)
@json_option
@version_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what an artifact says of itself; its tensors are not verified."""
    from store import summarise

    summary = summarise(artifact)
    document = {
        "file": summary.file,
        "file_bytes": summary.file_bytes,
        "manifest_sha256": summary.manifest_sha256,
        "images_per_class": summary.images_per_class,
        "verified": False,
        "manifest": summary.manifest,
    }
    emit(as_json, document, [*summary.rows(), ("", "tensors not verified")])


@store.command(epilog=example("clip-embed-kd store verify *.safetensors"))
@click.argument("artifacts", nargs=-1, required=True, type=PATH, metavar="PATH…")
@json_option
@version_option
def verify(artifacts: Sequence[Path], as_json: bool) -> None:
    """Check every byte of artifacts, one line each; exit status 1 if any of them failed."""
    from pipeline.errors import printable
    from store import StoreError, verify_artifact

    documents = []
    for path in artifacts:
        document: dict[str, Any] = {"path": str(path), "ok": True, "manifest_sha256": None, "error": None}
        try:
            with byte_progress("verifying", [path]) as progress:
                document["manifest_sha256"] = verify_artifact(path, progress=progress)
        except (StoreError, OSError, MemoryError) as error:
            text = explain(error)[0] or "there is not enough memory for it."
            for name in (str(path), path.name):  # each on one line, as `explain` has it
                text = text.removeprefix(" ".join(f"{name}:".split()) + " ")
            document["ok"], document["error"] = False, text
        documents.append(document)
        if not as_json:
            click.echo(printable(f"{path}: " + ("ok" if document["ok"] else f"FAILED: {document['error']}")))
    if as_json:
        click.echo(as_json_text(documents))
    if not all(document["ok"] for document in documents):
        sys.exit(1)


@store.command(epilog=example("clip-embed-kd store convert cifar100.safetensors --out small.h5 --dtype int8"))
@click.argument("artifact", type=PATH)
@click.option("--out", required=True, type=PATH, help="artifact to write: .safetensors or .h5")
@click.option("--dtype", type=click.Choice(["float32", "float16", "int8"]), help="of stored samples  [default: as is]")
@click.option("--class-only", is_flag=True, help="leave the samples out")
@click.option("--drop-class", "drop_classes", multiple=True, metavar="NAME", help="leave a class out; may be repeated")
@_gzip_option
@overwrite_option
@json_option
@version_option
def convert(artifact: Path, out: Path, overwrite: bool, as_json: bool, **changes: Any) -> None:
    """Write an artifact in another container or type, and say what that lost."""
    from pipeline.progress import size
    from store import Conversion, convert_artifact

    with byte_progress("converting", [artifact, artifact]) as progress:
        result = convert_artifact(artifact, out, Conversion(**changes), overwrite=overwrite, progress=progress)
    loss, before, after = result.loss, result.bytes_before, result.bytes_after
    document = {
        "artifact": str(out),
        "manifest_sha256": result.manifest.sha256(),
        "bytes_before": before,
        "bytes_after": after,
        "loss": dataclasses.asdict(loss) if loss else None,
        "notes": result.notes,
    }
    rows = [
        ("artifact", f"{out}, {size(after)}, was {size(before)} ({(after - before) / before:+.1%})"),
        ("digest", result.manifest.sha256()),
    ]
    if loss:
        rows += [
            ("cosine", f"mean {loss.mean_cosine:.7f}, worst {loss.worst_cosine:.7f}, of {loss.num_rows:,} samples"),
            (
                "classes",
                f"nearest one unchanged for {loss.nearest_class_agreement:.2%} of {loss.num_compared:,} samples",
            ),
        ]
    else:
        rows.append(("loss", "none: what was kept is kept to the bit"))
    emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])


@store.command(epilog=example("clip-embed-kd store merge one.safetensors two.safetensors --out both.safetensors"))
@click.argument("artifacts", nargs=-1, required=True, type=PATH, metavar="ARTIFACT…")
@click.option("--out", required=True, type=PATH, help="artifact to write: .safetensors or .h5")
@click.option("--allow-overlap", is_flag=True, help="store an image that several have once, and count it each time")
@overwrite_option
@json_option
@version_option
def merge(artifacts: Sequence[Path], out: Path, as_json: bool, **options: Any) -> None:
    """Merge artifacts of one teacher, as if one extraction had seen all their images."""
    from store import merge_artifacts

    with byte_progress("merging", [*artifacts, *artifacts]) as progress:
        result = merge_artifacts(artifacts, out, progress=progress, **options)
    manifest = result.manifest
    samples = manifest.tensors.get("sample/key")
    repeats = f", and {result.num_shared:,} repeats of them left out" if result.num_shared else ""
    document = {
        "artifact": str(out),
        "manifest_sha256": manifest.sha256(),
        "num_classes": len(manifest.classes),
        "num_samples": samples.shape[0] if samples else 0,
        "num_shared": result.num_shared,
        "notes": result.notes,
    }
    rows = [
        ("artifact", f"{out}, {out.stat().st_size:,} bytes"),
        ("digest", manifest.sha256()),
        ("classes", f"{len(manifest.classes):,}"),
        ("samples", f"{samples.shape[0] if samples else 0:,}" + repeats),
    ]
    emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])


@store.command(epilog=example("clip-embed-kd store plot cifar100.safetensors --out cifar100.png"))
@click.argument("artifact", type=PATH)
@click.option("--out", required=True, type=PATH, help="picture to draw: .png or .svg")
@click.option("--method", type=click.Choice(["tsne", "pca"]), default="tsne", help="how the maps are laid out")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="of t-SNE, and of the choice of samples")
@click.option("--overwrite", is_flag=True, help="replace an existing picture")
@json_option
@version_option
def plot(artifact: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Draw which classes the teacher finds alike, and maps of classes and samples."""
    from pipeline.pictures import plot_artifact
    from pipeline.progress import log_to_stderr

    log_to_stderr()
    result = plot_artifact(artifact, out, **options)
    document = {
        "picture": str(out),
        "num_classes": result.num_classes,
        "num_samples": result.num_samples,
        "notes": result.notes,
    }
    rows = [("picture", str(out)), ("classes", f"{result.num_classes:,}"), ("samples", f"{result.num_samples:,}")]
    emit(as_json, document, [*rows, *(("note", note) for note in result.notes)])
