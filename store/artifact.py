"""Open artifacts, whatever their container.

Opening reads the header and the manifest only. `artifact[name]` checks a tensor's digest before it hands
out a read-only memory map of it; `gather` reads single rows and checks nothing but their bounds.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.backends import backend_of
from store.container import Header, Location, Progress, ignore
from store.digest import ThreadedSha256
from store.errors import ArtifactDigestError, ArtifactFormatError, ArtifactNotFoundError
from store.manifest import Manifest, parse_manifest
from store.pairs import PairIndex
from store.stored import Identity, StoredTensor, identity_of


class Artifact:
    """An open artifact. Use it as a context manager; made by `open_artifact`.

    `manifest_sha256` names the whole artifact, since the digest of every tensor stands in the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, header: Header, identity: Identity) -> None:
        """Hold what `open_artifact` found; use that."""
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = header.manifest_sha256
        absolute = path.absolute()  # the working directory may change before a tensor is read
        self._tensors = {
            name: StoredTensor(absolute, identity, name, place) for name, place in header.locations.items()
        }
        self._verified: set[str] = set()
        self._pairs: PairIndex | None = None

    def __enter__(self) -> "Artifact":
        """Return the artifact itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Forget the memory maps; arrays that were handed out stay valid."""
        self._pairs = None
        for tensor in self._tensors.values():
            tensor.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the index of pairs: it is made anew there, if it is needed."""
        return {**self.__dict__, "_pairs": None}

    def __contains__(self, name: object) -> bool:
        """Tell whether the artifact has a tensor of this name."""
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a whole tensor, its digest checked at the first access.

        Args:
            name: e.g. `class/mean`.

        Returns:
            Read-only, of dtype and shape as the manifest says, little-endian: a memory map, or an array in memory
            where the file holds it compressed.

        Raises:
            KeyError: the artifact has no such tensor.
            ArtifactDigestError: the bytes differ from the manifest's SHA-256.
            ArtifactFormatError: a value is not finite, or a class has no images.
        """
        self.verify(name)
        tensor = self.stored(name).whole()
        if name == "class/count":
            layout.check_counts(tensor, self.path.name)
        return tensor

    def verify(self, name: str, progress: Progress = ignore) -> None:
        """Check a tensor's digest and that its values are finite, once, in constant memory.

        Args:
            name: e.g. `sample/embedding`.
            progress: told of the bytes of each block that was checked.

        Raises:
            KeyError: the artifact has no such tensor.
            ArtifactDigestError: the bytes differ from the manifest's SHA-256.
            ArtifactFormatError: a value is not finite.
        """
        if name in self._verified:
            return
        blocks = self.stored(name).blocks()
        block = next(blocks, None)
        with ThreadedSha256() as digest:
            while block is not None:
                with digest.beside(block):  # reads the next one meanwhile
                    layout.check_finite(name, block, self.path.name)
                    progress(block.nbytes)
                    block = next(blocks, None)
        expected = self.manifest.tensors[name].sha256
        if digest.hexdigest() != expected:
            raise ArtifactDigestError(
                f"{self.path.name}: {name} has SHA-256 {digest.hexdigest()[:12]}…, the manifest says "
                f"{expected[:12]}…. The file is damaged: copy or extract it again."
            )
        self._verified.add(name)

    def gather(self, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Read some rows of a tensor; nothing else is read, and no digest is checked.

        Args:
            name: e.g. `sample/embedding`.
            rows: [R], each in 0…length−1, in any order, repeats allowed.

        Returns:
            [R, …], a copy.

        Raises:
            KeyError: the artifact has no such tensor.
            IndexError: a row is negative or beyond the last one.
        """
        stored = self.stored(name)
        length = stored.shape[0]
        if len(rows) and (rows.min() < 0 or rows.max() >= length):
            raise IndexError(f"{name} has rows 0 to {length - 1}, asked for {rows.min()} to {rows.max()}")
        return stored.gather(rows)

    def find(self, keys: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Find the rows of (sample key, label) pairs.

        Args:
            keys: [N, 16] uint8 sample keys.
            labels: [N], class rows of this artifact.

        Returns:
            [N] int64: the row in `sample/*` of each pair, −1 where there is none.

        Raises:
            KeyError: the artifact has no samples.
            ArtifactFormatError: its pairs are not sorted or not unique.
        """
        if self._pairs is None:
            self._pairs = PairIndex(self["sample/key"], self["sample/label"], self.path.name)
        return self._pairs.find(keys, labels)

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor unverified."""
        if name not in self._tensors:
            raise KeyError(f"{self.path.name} has no tensor {name!r}; it has {sorted(self._tensors)}")
        return self._tensors[name]


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact; header and manifest are checked, no tensor is read.

    Args:
        path: a `.safetensors`, `.h5` or `.hdf5` file.

    Returns:
        The artifact, to be used as a context manager.

    Raises:
        ArtifactNotFoundError: no such file, or no permission to read it.
        ArtifactFormatError: not a valid artifact (also version and digest errors, which are kinds of it).
    """
    path = Path(path)
    backend = backend_of(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
            raise ArtifactNotFoundError(f"{path}: artifact {what}. Make one with `clip-embed-kd extract`.")
        identity = identity_of(path.stat())
        header = backend.read_header(path)
    except PermissionError:
        raise ArtifactNotFoundError(f"{path}: no permission to read the artifact.") from None
    except OSError as error:
        raise ArtifactNotFoundError(f"{path}: cannot be read ({error.strerror}).") from None
    manifest = parse_manifest(header.manifest, header.manifest_sha256, path.name)
    layout.check_layout(manifest, path.name)
    _check_agreement(manifest, header.locations, path.name)
    return Artifact(path, manifest, header, identity)


def _check_agreement(manifest: Manifest, locations: Mapping[str, Location], where: str) -> None:
    if set(manifest.tensors) != set(locations):
        odd = sorted(set(manifest.tensors) ^ set(locations))[0]
        side = "manifest" if odd in manifest.tensors else "file"
        raise ArtifactFormatError(f"{where}: {odd!r} stands in the {side} only. The file is damaged: extract it again.")
    for name, info in manifest.tensors.items():
        place = locations[name]
        if (place.dtype, place.shape) != (info.dtype, info.shape):
            raise ArtifactFormatError(
                f"{where}: {name} is {place.dtype} {list(place.shape)}, the manifest says "
                f"{info.dtype} {list(info.shape)}. The file is damaged: extract it again."
            )
