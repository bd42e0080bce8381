"""The command as processes of its own: run to the end, watched for memory, or killed at random moments."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

_KINDS = {"RssAnon": "anonymous", "RssFile": "file pages", "VmHWM": "resident"}
_POLL_SECONDS = 0.01


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command of the interpreter and return its JSON."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    """Return what stands in a folder: the bytes of each file, nothing for a folder."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def watch(command: Sequence[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """Run a command; return, in kB, the most memory of each kind that it held at one time (Linux), and its JSON.

    Anonymous memory and file pages are looked at every hundredth of a second; what was resident is the kernel's record.
    """
    peaks = dict.fromkeys(_KINDS.values(), 0)
    with TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *command], stdout=told)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for name, value in re.findall(r"^(\w+):\s+(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE):
                if name in _KINDS:
                    peaks[_KINDS[name]] = max(peaks[_KINDS[name]], int(value))
            time.sleep(_POLL_SECONDS)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        told.seek(0)
        document: dict[str, Any] = json.loads(told.read())
        return peaks, document


@dataclass(frozen=True)
class Alone:
    """A run that nobody killed: what it left in its folder, its seconds, and those of its embedding phase."""

    left: dict[str, bytes]
    seconds: float
    embedding_seconds: float


@dataclass
class Outcome:
    """What became of a command that was killed `killed_in` these phases.

    `num_resumed` images were there already when its last run began; none where no run followed. `num_damaged` times it
    left an artifact that is not whole; files that are `differing` in the end are other ones, missing, or too many.
    """

    number: signal.Signals
    killed_in: list[str] = field(default_factory=list)
    odd_exits: list[int] = field(default_factory=list)
    num_damaged: int = 0
    num_resumed: int | None = None
    differing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Killer:
    """Kills a command by a signal, once or twice, and lets it finish then."""

    number: signal.Signals
    alone: Alone
    chance: random.Random

    def kill(self, command: Sequence[str], out: Path, *, in_embedding: bool) -> Outcome:
        """Kill a command that writes `out`, run it until it is finished, and compare with the run left alone.

        Args:
            command: of the interpreter.
            out: the artifact, alone in its folder.
            in_embedding: let the first moment lie in the embedding phase, not anywhere.

        Returns:
            What became of it. `killed_in` is empty where it was finished before the first signal.
        """
        outcome = Outcome(self.number)
        for is_first in (True, False)[: 1 + self.chance.randrange(2)]:
            code, told = self._kill_once(command, out, in_embedding=in_embedding and is_first)
            if code == 0:
                outcome.num_resumed = json.loads(told)["num_resumed"]
                break
            outcome.killed_in.append(_phase(out))
            # Python itself dies of SIGTERM while it starts; the command exits with 143.
            if code not in (-self.number, 128 + self.number):
                outcome.odd_exits.append(code)
            outcome.num_damaged += out.exists() and out.read_bytes() != self.alone.left[out.name]
            if outcome.killed_in[-1] == "end":
                break
        else:
            outcome.num_resumed = run(command)["num_resumed"]
        found, wanted = contents(out.parent), self.alone.left
        outcome.differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        return outcome

    def _kill_once(self, command: Sequence[str], out: Path, *, in_embedding: bool) -> tuple[int, bytes]:
        with TemporaryFile() as told:
            process = subprocess.Popen([sys.executable, *command], stdout=told, stderr=subprocess.DEVNULL)
            while in_embedding and process.poll() is None and not _partial(out).exists():
                time.sleep(_POLL_SECONDS)
            moment = self.chance.uniform(0, self.alone.embedding_seconds if in_embedding else self.alone.seconds)
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            process.send_signal(self.number)
            code = process.wait()
            told.seek(0)
            return code, told.read()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _phase(out: Path) -> str:
    """Tell by its files what a process was at when it died; at the end all that it makes is there."""
    if out.exists():
        return "report card" if _partial(out).exists() else "end"
    return "embedding" if _partial(out).exists() else "start"
