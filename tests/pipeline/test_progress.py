"""Progress and messages: a bar on a terminal, plain lines elsewhere, all on stderr."""

import io
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import LOGGER, ProgressBar, duration, log_to_stderr, size


@pytest.fixture(autouse=True)
def _logger_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(LOGGER, "handlers", [])
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "_CONSOLE", Console(file=screen, force_terminal=True, width=120))
    return screen


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (8.44, "8.4 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (119.6, "2 min 00 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (200_000, "55 h 33 min"),
        (59.96, "1 min 00 s"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (1_200_000, "1.2 MB"),
        (3_400_000_000, "3.4 GB"),
        (1e12, "1.0 TB"),
        (5e15, "5000.0 TB"),
        (999_950, "1.0 MB"),
        (999.6, "1.0 kB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_messages_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    LOGGER.info("%d of [bold]%s[/bold]", 3, "a line that is longer than any terminal is wide " * 5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"3 of [bold]{'a line that is longer than any terminal is wide ' * 5}[/bold]\n"


def test_messages_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    LOGGER.info("\nread from %s", "cc\x1b[31mX :cat: \u202e\udcff")
    assert capsys.readouterr().err == "\nread from cc\\x1b[31mX :cat: \\u202e\\udcff\n"


class Gone(io.StringIO):
    """The stderr of a terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        self.write("")


def test_messages_and_bars_to_a_terminal_that_is_gone_hold_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Gone())
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    log_to_stderr()
    with ProgressBar("embedding", 10) as bar:
        bar.advance(10)
    LOGGER.info("nobody reads this")


@pytest.mark.parametrize("bar", ["False", "True"])
def test_a_process_outlives_the_reader_of_its_messages(bar: str) -> None:
    program = f"""
        import sys, warnings
        from pipeline import progress
        progress._CONSOLE._force_terminal = {bar}
        progress._PLAIN_SECONDS = 0
        progress.log_to_stderr()
        with progress.ProgressBar("training", 9) as bar:
            for _ in range(9):
                bar.advance(1)
                progress.LOGGER.info("a line")
        warnings.warn("another library's")
        print("done", file=sys.stderr)
        print("done")
    """
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_asking_twice_for_messages_shows_them_once(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    log_to_stderr()
    LOGGER.info("once")
    assert capsys.readouterr().err == "once\n"


def test_nothing_is_shown_before_a_command_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.info("quiet")
    with ProgressBar("embedding", 2) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_are_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 30.0, 40.0, 60.0, 61.0])
    monkeypatch.setattr("pipeline.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    log_to_stderr()
    with ProgressBar("training", 100, "steps") as bar:
        bar.advance(5)
        bar.advance(25)
        bar.advance(10)
        bar.advance(20, "loss 1.5")
    assert bar.seconds == 61.0
    first, second = capsys.readouterr().err.splitlines()
    assert first.rstrip() == "training: 30 of 100 steps, 1 steps/s, 1 min 10 s left"
    assert second == "training: 60 of 100 steps, 1 steps/s, 40.0 s left loss 1.5"


def test_what_was_done_before_is_not_of_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 40.0, 41.0])
    monkeypatch.setattr("pipeline.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    log_to_stderr()
    with ProgressBar("training", 100, "steps", done=50) as bar:
        bar.advance(40)
    assert capsys.readouterr().err.rstrip() == "training: 90 of 100 steps, 1 steps/s, 10.0 s left"


def test_a_plain_line_ends_with_its_last_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    log_to_stderr()
    with ProgressBar("embedding", 10) as bar:
        bar.advance(10)
    assert capsys.readouterr().err.endswith(" left\n")


def test_plain_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    with ProgressBar("embedding", 1000) as bar:
        for _ in range(1000):
            bar.advance(1)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_with_count_rate_and_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = as_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    log_to_stderr()
    with ProgressBar("embedding", 7) as bar:
        bar.advance(3)
        bar.advance(2, "loss 1.5")
    shown = screen.getvalue()
    for text in ("embedding", "5/7", "images/s", "loss 1.5"):
        assert text in shown
    assert "left" not in shown
    assert capsys.readouterr().out == ""


def test_names_in_a_bar_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = as_terminal(monkeypatch)
    with ProgressBar("split [red]a\x1b[2J", 10) as bar:
        bar.advance(5, "class [bold]b")
    assert "split [red]a\\x1b[2J" in screen.getvalue()
    assert "class [bold]b" in screen.getvalue()


def test_the_clock_stops_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    as_terminal(monkeypatch)
    bar = ProgressBar("embedding", 2)
    with pytest.raises(KeyboardInterrupt), bar:
        raise KeyboardInterrupt
    assert bar.seconds >= 0
