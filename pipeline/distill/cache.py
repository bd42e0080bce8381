"""The image cache: a split decoded once at the student's size, for every later run.

An entry holds pixels and sample keys, never labels: what decides it is the data set, the image column, the size, the
views, and the versions of all that renders. Anybody may remove the folder, or an entry in it, at any time.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import BadImageError, Labelled, raise_bad
from pipeline.distill.cache_entry import CacheEntry, DamagedEntryError, Stored
from pipeline.distill.decoding import Block, ReplayedViews, decode_blocks
from pipeline.distill.images import DecodedImages
from pipeline.errors import PipelineError
from pipeline.pixels import SAMPLE_KEY_VERSION
from pipeline.progress import LOGGER, ProgressBar, duration, size
from pipeline.views import VIEWS_VERSION

CACHE_VERSION = 1  # another one wherever the same images would become other pixels
CACHE_VARIABLE = "CLIP_EMBED_KD_CACHE"


def cached_images(
    data: Labelled,
    image_size: int,
    *,
    skip_bad: bool,
    views: ReplayedViews | None = None,
    cache: Path | None = None,
) -> DecodedImages:
    """Take all images of a split from the cache, or decode them into it.

    Args:
        data: the split.
        image_size: side of the student's input in pixels.
        skip_bad: leave out images that cannot be decoded, instead of stopping at the first.
        views: which views to render; none: the images themselves. Each view, and for view 0 the image, is fitted
            to `image_size`; keys are of the decoded original.
        cache: folder of the cache; none: `default_cache`.

    Returns:
        The images, in the order of the rows, mapped read-only.

    Raises:
        BadImageError: an image cannot be decoded, or, whatever `skip_bad` says, could not be read just now.
        PipelineError: no image can be decoded, or the cache cannot be written to.
    """
    views = views if views is not None and views.count > 1 else None
    shape = (1 if views is None else views.count, image_size, image_size, 3)
    entry = CacheEntry(cache or default_cache(), _content(data, image_size, views), len(data), shape)
    try:
        stored = _read(entry, data, skip_bad)
    except DamagedEntryError:
        stored = None  # another process may be making it anew: the lock will tell
    if stored is None:
        stored = _make(entry, data, image_size, views, skip_bad)
    if num_bad := len(data) - len(stored.rows):
        LOGGER.info("%d images of split %s could not be decoded and were left out.", num_bad, data.settings.split)
    rows = np.array(stored.rows, np.int64)
    return DecodedImages(
        pixels=stored.pixels,
        places=np.arange(len(rows)),
        source_rows=data.numbers[rows],
        keys=np.array(stored.keys),
        labels=data.labels[rows],
    )


def default_cache() -> Path:
    """Return where decoded images are kept unless somebody says otherwise.

    Returns:
        What the environment variable CLIP_EMBED_KD_CACHE says, else `clip-embed-kd/images` in XDG_CACHE_HOME, else in
        the `.cache` of the user.

    Raises:
        PipelineError: the user has no home.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # its specification wants such values ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise PipelineError("there is no home folder to keep decoded images in. Choose one with --cache.") from None
    return base / "clip-embed-kd" / "images"


def _content(data: Labelled, image_size: int, views: ReplayedViews | None) -> dict[str, Any]:
    """Gather what decides an entry, as plain JSON that people can read; no local path."""
    return {
        "cache_version": CACHE_VERSION,
        "data_set": data.name,
        "split": data.settings.split,
        "num_rows": len(data),
        "fingerprint": data.rows._fingerprint,
        "files": _files_digest(data),
        "image_column": data.image_column,
        "image_size": image_size,
        "views": None if views is None else {**asdict(views), "views_version": VIEWS_VERSION},
        "sample_key_version": SAMPLE_KEY_VERSION,
        "pillow": version("pillow"),
        "torchvision": version("torchvision"),
    }


def _files_digest(data: Labelled) -> str:
    """Digest size and time of every file that the images come from.

    The fingerprint of `datasets` says how rows were made, not what they hold: a saved data set that was made again by
    the same function from other files has the same one, and of images outside its own files it knows nothing.
    """
    paths = [file["filename"] for file in data.rows.cache_files]
    for chunk in data.rows.data.column(data.image_column).chunks:
        if chunk.field("bytes").null_count:
            outside = chunk.field("path").filter(chunk.field("bytes").is_null())
            paths += [path for path in outside.to_pylist() if path is not None]
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116 (there may be millions)
            digest.update(b"%d %d\n" % (found.st_size, found.st_mtime_ns))
        except OSError:  # such an image cannot be decoded, and is counted then
            digest.update(b"missing\n")
    return digest.hexdigest()


def _read(entry: CacheEntry, data: Labelled, skip_bad: bool) -> Stored | None:
    """Read an entry, say so, and find the same bad image in it that decoding would find."""
    stored = entry.read()
    if stored is None:
        return None
    if not skip_bad and len(absent := np.setdiff1d(np.arange(len(data)), stored.rows)):
        (image,) = data.read(absent[:1].tolist())
        if isinstance(image, BadImageError):
            raise image
        raise DamagedEntryError(f"it lacks row {data.numbers[absent[0]]}, which can be decoded")
    LOGGER.info("Images of split %s: read from the cache %s.", data.settings.split, entry.folder)
    return stored


def _make(entry: CacheEntry, data: Labelled, image_size: int, views: ReplayedViews | None, skip_bad: bool) -> Stored:
    with entry.writing():
        try:
            if (stored := _read(entry, data, skip_bad)) is not None:
                return stored  # another process made it
        except DamagedEntryError as error:
            LOGGER.info("%s: is damaged (%s): made anew.", entry.folder, error)
        entry.make_room()
        what = "decoding" if views is None else "rendering views of"
        with (
            closing(decode_blocks(data, image_size, views)) as blocks,
            ProgressBar(f"{what} {data.settings.split}", len(data)) as bar,
        ):
            entry.write(_checked(blocks, data, bar, skip_bad))
        stored = entry.read_back()
    LOGGER.info(
        "Images of split %s: %s in %s, kept in the cache %s (%s).",
        data.settings.split,
        "decoded" if views is None else f"{views.count} views rendered",
        duration(bar.seconds),
        entry.folder,
        size(stored.pixels.nbytes),
    )
    return stored


def _checked(blocks: Iterable[Block], data: Labelled, bar: ProgressBar, skip_bad: bool) -> Iterator[Block]:
    num_images = 0
    for block in blocks:
        raise_bad(block.bad, skip_bad=skip_bad)
        num_images += len(block.rows)
        yield block
        bar.advance(len(block.rows) + len(block.bad))
    if num_images == 0:
        raise PipelineError(f"{data.settings.dataset}, split {data.settings.split}: no image could be decoded.")
