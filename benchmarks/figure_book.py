"""The file of figures: what was measured on one machine, kept over several calls; and what of it is false."""

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline.output import write_atomically

Figures = dict[str, Any]


class FigureBook:
    """Figures by measure, written as soon as they are known.

    Of what a measure returns, `checks` and `targets` are judged: each says in words what should hold, and whether it
    does. A trial's targets are not, since little data proves nothing.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], of: Mapping[str, Any], *, is_trial: bool) -> None:
        """Go on with a file, or begin one.

        Args:
            path: the JSON file; made with the first figure.
            machine: the facts that figures depend on.
            of: what these figures are of; noted beside each measure.
            is_trial: leave targets unjudged.

        Raises:
            click.UsageError: the file's figures are of another machine.
        """
        self._path, self._of, self._is_trial = path, dict(of), is_trial
        self._figures: Figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._failed: list[str] = []
        if self._figures.setdefault("machine", dict(machine)) != machine:
            raise click.UsageError(f"{path} is of another machine: {self._figures['machine']}. Choose another --work.")

    def known(self, name: str) -> Figures:
        """Return what is known of a measure so far, from earlier calls too."""
        found: Figures = self._figures.get(name, {})
        return found

    def note(self, name: str, measured: Figures) -> None:
        """Write what a measure knows so far, in place of what it knew before."""
        self._figures[name] = {"of": self._of, **measured}
        write_atomically(self._path, json.dumps(self._figures, indent=2, ensure_ascii=False).encode())

    def measure(self, name: str, function: Callable[[], Figures]) -> None:
        """Run a measure; note, print and judge its figures. One that fails is a check that fails: the others go on."""
        try:
            measured = function()
        except subprocess.CalledProcessError as error:  # says itself why
            measured = {"checks": {"the command succeeds": False}, "exit status": error.returncode}
        except Exception as error:
            traceback.print_exc()
            measured = {"checks": {"the measure succeeds": False}, "error": f"{type(error).__name__}: {error}"}
        self.note(name, measured)
        click.echo(f"{name}: {json.dumps(self.known(name), indent=2, ensure_ascii=False)}")
        judged = measured.get("checks", {}) | ({} if self._is_trial else measured.get("targets", {}))
        self._failed += [f"{name}, {text}" for text, holds in judged.items() if not holds]

    def finish(self) -> NoReturn:
        """Say what is false, and exit: with 1 if anything is."""
        for text in self._failed:
            click.echo(f"false: {text}", err=True)
        sys.exit(1 if self._failed else 0)
