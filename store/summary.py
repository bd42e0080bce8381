"""What an artifact says of itself, for people and for machines. Nothing is verified here but the manifest."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from store.artifact import open_artifact


@dataclass(frozen=True)
class Summary:
    """An artifact in brief.

    `manifest` is the whole manifest as plain JSON; `images_per_class` are (fewest, most).
    """

    file: str
    file_bytes: int
    manifest_sha256: str
    images_per_class: tuple[int, int]
    manifest: dict[str, Any]

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the summary."""
        teacher, data = self.manifest["teacher"], self.manifest["data_set"]
        sampling, classes = self.manifest["sampling"], self.manifest["classes"]
        fewest, most = self.images_per_class
        asked = "all" if sampling["per_class"] is None else sampling["per_class"]
        shown = ", ".join(classes[:6]) + (", …" if len(classes) > 6 else "")
        version = self.manifest["format"]
        rows = [
            (
                "artifact",
                f"{self.file}, {self.file_bytes:,} bytes, format {version['major']}.{version['minor']}",
            ),
            ("digest", f"{self.manifest_sha256} (of the manifest)"),
            (
                "teacher",
                f"{_named(teacher)}, {teacher['architecture']}, licence {teacher['licence'] or 'not stated'}",
            ),
            (
                "embedding",
                f"{teacher['embed_dim']} values, pooling {teacher['pooling']}, {teacher['precision']}",
            ),
            ("data set", f"{_named(data)}, split {data['split']}, {data['rows']:,} rows"),
            ("columns", f"{data['image_column']}, {data['label_column']}"),
            ("sampling", f"{asked} images a class, seed {sampling['seed']}, {sampling['views']} view(s)"),
            (
                "images",
                f"{fewest:,} to {most:,} in a class" if fewest != most else f"{fewest:,} in each class",
            ),
            ("classes", f"{len(classes):,}: {shown}"),
        ]
        if text := self.manifest.get("text"):
            prompts = text["prompts"]
            rows.append(("text", f"{len(prompts)} prompt(s), the first {prompts[0]!r}"))
        for name, info in self.manifest["tensors"].items():
            rows.append((name, f"{info['dtype']} {info['shape']}"))
        return rows


def summarise(path: str | os.PathLike[str]) -> Summary:
    """Read an artifact's header and image counts.

    Args:
        path: the artifact.

    Returns:
        Its summary.

    Raises:
        StoreError: it is missing or not a valid artifact.
    """
    with open_artifact(path) as artifact:
        manifest = artifact.manifest
        count = artifact.gather("class/count", np.arange(len(manifest.classes)))
        return Summary(
            file=artifact.path.name,
            file_bytes=Path(path).stat().st_size,
            manifest_sha256=artifact.manifest_sha256,
            images_per_class=(int(count.min()), int(count.max())),
            manifest=json.loads(manifest.to_bytes()),
        )


def _named(source: dict[str, Any]) -> str:
    return f"{source['name']} at {source['revision'][:12]}" if source["revision"] else str(source["name"])
