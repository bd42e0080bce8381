"""Write docs/commands.md from the commands' own help: `make docs`. A test checks that it is up to date."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "commands.md"
INTRODUCTION = """# Commands

Made from the commands' own `--help` by `make docs`. `clip-embed-kd` and `python cli.py` are the same.

Results go to stdout (`--json` for machines), progress and messages to stderr. Exit status: 0 done, 1 failed with one
line that says what to do, 2 wrong usage, 130 and 143 interrupted by Ctrl-C and SIGTERM.
"""


def page() -> str:
    """Return the whole page."""
    sys.path.insert(0, str(ROOT))
    import cli

    sections = [f"## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(cli.cli, "clip-embed-kd", parent=None)]
    return "\n".join([INTRODUCTION, *sections])


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, info_name=name.split()[-1], parent=parent, terminal_width=100, **command.context_settings
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            yield from _helps(command.commands[child_name], f"{name} {child_name}", context)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
