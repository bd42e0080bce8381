"""The place of a run directory: what may be there, one process at a time, and a new one that appears at once.

Knows nothing of what is written there.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.folder_lock import LOCK_NAME, FolderLock
from pipeline.output import check_output


class Place:
    """Where a run is written: into `work`, which is beside `path` until `publish` makes it that."""

    def __init__(self, path: Path, *, overwrite: bool, resume: bool) -> None:
        """Check the place; nothing is written yet.

        Args:
            path: the directory to make.
            overwrite: replace an older run directory there.
            resume: go on with an older run there, if there is one.

        Raises:
            PipelineError: something else is there, or it cannot be made.
        """
        if overwrite and resume:
            raise PipelineError("--resume goes on with a run, --overwrite begins it anew: pass one of them.")
        self.path = path = path.resolve() if path.is_symlink() else path
        self.resumes, self._overwrites = resume and path.exists(), overwrite
        if path.exists() and (overwrite or resume) and not (path / "run.json").is_file():
            what = "resumed" if resume else "overwritten"
            raise PipelineError(f"{path}: is not a run directory, so it is not {what}. Choose another --out.")
        self._check_free()
        check_output(path, 0, replaceable=overwrite or resume)
        name = path.absolute().name
        beside = path.absolute().with_name(f".{name}.partial")
        self.work = path if self.resumes else beside
        self._aside = path.absolute().with_name(f".{name}.replaced")  # the older run, while the new one takes its place
        _refuse_links(beside, self._aside, *(path.rglob("*") if self.resumes else ()))

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make `work`, empty unless the run is gone on with, and keep other processes out inside the block.

        Raises:
            PipelineError: another process trains there, or was there first.
        """
        with ExitStack() as stack:
            try:
                self._lock(stack)
                if not self.resumes:
                    self._clear()
            except OSError as error:
                raise PipelineError(f"{self.path}: cannot be written ({error.strerror or error}).") from None
            yield

    def publish(self) -> bool:
        """Make `work` the run directory, in place of an older one; tell whether it was not that already."""
        if self.work == self.path:
            return False
        if self.path.exists():
            self.path.rename(self._aside)
        self.work.rename(self.path)
        self.work = self.path
        shutil.rmtree(self._aside, ignore_errors=True)
        return True

    def _check_free(self) -> None:
        if self.path.exists() and not (self._overwrites or self.resumes):
            raise PipelineError(f"{self.path}: exists. Pass --resume to go on with it, --overwrite, or another --out.")

    def _lock(self, stack: ExitStack) -> None:
        taken = f"{self.path}: another process trains there. Wait for it, or choose another --out."
        locked: list[Path] = []
        for folder in (self.path, self.work, self.path):  # which may have appeared meanwhile
            if folder == self.work:
                folder.mkdir(exist_ok=True)
            elif locked and self._aside.exists() and not folder.exists():
                self._aside.rename(folder)  # what was replacing it was killed before it stood there itself
            if folder in locked or not folder.exists():
                continue
            lock = FolderLock(folder, taken)
            lock.take()
            locked.append(folder)
            stack.callback(lock.release)
            stack.callback((self.path / LOCK_NAME).unlink, missing_ok=True)
            if folder == self.work:
                stack.callback(self._drop_unpublished)
        self._check_free()  # another process may have finished there just now

    def _drop_unpublished(self) -> None:
        if self.work != self.path:
            shutil.rmtree(self.work, ignore_errors=True)

    def _clear(self) -> None:
        """Remove what runs that were killed have left."""
        shutil.rmtree(self._aside, ignore_errors=True)
        for left in self.work.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK_NAME:
                left.unlink()


def _refuse_links(*paths: Path) -> None:
    """Refuse what leads elsewhere: a run directory that somebody sent is written into, and what is old is removed."""
    for path in paths:
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            raise PipelineError(
                f"{path}: is neither a file nor a folder, but a link or the like, which no run has. Remove it, or "
                "choose another --out."
            )
