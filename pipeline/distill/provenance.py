"""Where a student comes from: what `run.json` says of its training, and the command that does it again.

A run record may be a stranger's: nothing in it is trusted to be there, or to be what it should.
"""

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from pipeline.data import DataSettings
from pipeline.distill.config import DistillSettings
from pipeline.errors import PipelineError, first_line

UNKNOWN = "not recorded"
_MAX_BYTES = 100_000_000  # of config.json with a million class names
_MAX_CHARACTERS = 200  # of one name
# Options that the command has from elsewhere in the record, or that say how to write.
_APART = frozenset({"artifact", "data", "dataset", "device", "max_steps", "out", "overrides", "overwrite", "precision"})
_PATHS = frozenset({"init", "recipe"})  # or may be
_FLAGS = {"config": "--dataset-config", "revision": "--dataset-revision"}


def parse_json(path: Path) -> Any:
    """Read a file of JSON, unless it is larger than any that is written here.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is too large, or not JSON.
        RecursionError: it is too deep.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES:,} bytes")
    return json.loads(path.read_text("utf-8"))


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        PipelineError: it cannot be read.
    """
    try:
        return parse_json(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PipelineError(f"{path}: cannot be read ({reason}).") from None


def read_record(folder: Path) -> Any:
    """Read what is recorded of a student's training.

    Args:
        folder: a run directory, or the `student` folder in it.

    Returns:
        What `run.json` holds; none where there is no such file, since a student may travel without it.

    Raises:
        PipelineError: it cannot be read.
    """
    place = folder.absolute()
    path = (place.parent if place.name == "student" and not (place / "student").is_dir() else place) / "run.json"
    return read_json(path) if path.is_file() else None


def recorded(record: Any, *keys: str) -> Any:
    """Return a value from nested JSON objects; none where it, or one on the way to it, is absent."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def base_name(value: Any) -> Any:
    """Return the last part of a path, since the others say how a machine is set up; anything else as it is."""
    return value.rpartition("/")[2] if isinstance(value, str) else value


def plain(value: Any) -> str:
    """Return a value as one line of printable characters, cut where it is long."""
    text = UNKNOWN if value is None else value if isinstance(value, str) else json.dumps(value)
    text = text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
    return "".join(character if character.isprintable() else " " for character in text)


def training_command(record: Any) -> str:
    """Return the command that trains the student of a run record again, for a shell; it names no path."""
    return " \\\n    ".join(_parts(record))


def _parts(record: Any) -> Iterator[str]:
    settings = recorded(record, "settings")
    yield "clip-embed-kd distill"
    yield f"--artifact {_argument(recorded(record, 'artifact', 'file'))}"
    yield f"--dataset {_argument(recorded(record, 'data', 'name'))}"
    data = recorded(settings, "data")
    data = dict(data) if isinstance(data, Mapping) else {}
    data["revision"] = recorded(record, "data", "revision") or data.get("revision")
    yield from _options(DataSettings.model_fields, data)
    yield from _options(DistillSettings.model_fields, settings)
    for name, value in _overrides(recorded(settings, "overrides")):
        yield f"--set {_argument(f'{name}={json.dumps(value)}')}"
    yield from _options(DistillSettings.model_fields, recorded(record, "compute"), apart=frozenset())
    yield f"--max-steps {_argument(recorded(record, 'result', 'num_steps'))}"
    yield "--out run"


def _overrides(overrides: Any) -> Iterator[tuple[str, Any]]:
    """Name each setting by itself: JSON, as which it is written, is TOML for all but tables."""
    for name, value in overrides.items() if isinstance(overrides, Mapping) else ():
        if isinstance(value, Mapping):  # there are none within others
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _options(fields: Mapping[str, FieldInfo], settings: Any, apart: Collection[str] = _APART) -> Iterator[str]:
    for name, field in fields.items():
        value = recorded(settings, name)
        if name in apart or value is None or value == field.default:
            continue
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        yield flag if value is True else f"{flag} {_argument(base_name(value) if name in _PATHS else value)}"


def _argument(value: Any) -> str:
    return shlex.quote(plain(value))
