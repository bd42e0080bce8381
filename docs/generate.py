"""Write what is made from the program itself: `make docs`. A test checks that it is up to date.

docs/commands.md comes from the commands' own help, docs/manifest.schema.json from the manifest's types.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
COMMANDS = ROOT / "docs" / "commands.md"
SCHEMA = ROOT / "docs" / "manifest.schema.json"
INTRODUCTION = """# Commands

Made from the commands' own `--help` by `make docs`. `clip-embed-kd` and `python cli.py` are the same.

Results go to stdout (`--json` for machines), progress and messages to stderr. Exit status: 0 done, 1 failed with one
line that says what to do, 2 wrong usage, 130 and 143 interrupted by Ctrl-C and SIGTERM.
"""


def commands() -> str:
    """Return the whole page of commands."""
    import cli

    sections = [f"## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(cli.cli, "clip-embed-kd", parent=None)]
    return "\n".join([INTRODUCTION, *sections])


def schema() -> str:
    """Return the manifest's JSON Schema: what a reader of this version accepts."""
    from store import Manifest

    document = _without_titles(Manifest.model_json_schema())
    # In Python these two have defaults, for a manifest that is not written yet.
    document["required"] = sorted({*document["required"], "format", "tensors"})
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of a clip-embed-kd artifact, format 1.0",
    }
    return json.dumps(head | document, indent=2, ensure_ascii=False, sort_keys=False) + "\n"


def _without_titles(node: Any) -> Any:
    if isinstance(node, dict):
        named = node.get("properties", {})
        kept = {key: _without_titles(value) for key, value in node.items() if key not in ("title", "properties")}
        return kept | ({"properties": {key: _without_titles(value) for key, value in named.items()}} if named else {})
    return [_without_titles(item) for item in node] if isinstance(node, list) else node


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, info_name=name.split()[-1], parent=parent, terminal_width=100, **command.context_settings
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            yield from _helps(command.commands[child_name], f"{name} {child_name}", context)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    COMMANDS.write_text(commands(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
