"""The program: all commands under one name, and how it ends.

Results go to stdout, progress and logs to stderr. Exit status: 0 done, 1 failed with one line on stderr,
2 wrong usage, 130 and 143 interrupted. The commands are in `pipeline/commands`, and
import what is heavy when they run.
"""

import os
import signal
import sys
from typing import Any, NoReturn

import click

from pipeline.commands.demo import demo
from pipeline.commands.distill import distill, plan, recipe
from pipeline.commands.extract import extract
from pipeline.commands.options import version_option
from pipeline.commands.printing import explain
from pipeline.commands.store import store
from pipeline.commands.student import evaluate, export, predict

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=_SETTINGS)
@version_option
def cli() -> None:
    """Distil a huge vision teacher into a small student, from its stored embeddings alone.

    Run `extract` once where the teacher fits, copy the artifact, and run `distill` where the student shall live.
    """


for _command in (extract, distill, plan, evaluate, predict, export, recipe, store, demo):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stopped)
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:
        from pipeline.errors import printable

        text, code = explain(error)
        if text is None:
            raise
        click.echo(f"Error: {printable(text)}", err=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while Python shuts down, an exception would be shown
    sys.exit(code if isinstance(code, int) else 0)


def _is_importing() -> bool:
    """Tell whether a library is being imported: some of them swallow an exception then, or abort."""
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _stopped(number: int, frame: Any) -> NoReturn:
    if _is_importing():
        os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"")
        os._exit(128 + number)  # what was being written, if anything, is left as by a power cut
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
