"""Paths in each container for the tests that both share."""

from pathlib import Path

import pytest

from tests.store.examples import STORAGES, SUFFIXES


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return where an artifact may be written, in a folder of its own."""
    return _path_in(tmp_path, request.param)


@pytest.fixture(params=STORAGES, ids=lambda storage: "gzip" if storage[1] else storage[0])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, bool]]:
    """Return where an artifact may be written, and how: in each container, and as gzip chunks."""
    suffix, gzip = request.param
    return _path_in(tmp_path, suffix), {"gzip": gzip}


def _path_in(tmp_path: Path, suffix: str) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / f"artifact{suffix}"
