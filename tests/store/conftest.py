"""One path in each container for the tests that both share."""

from pathlib import Path

import pytest

from tests.store.examples import SUFFIXES


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return where an artifact may be written, in a folder of its own."""
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / f"artifact{request.param}"
