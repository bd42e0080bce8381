"""Programs of the interpreter that run side by side, and can all be asked to stop at once."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

GRACE_SECONDS = 45.0


class StoppedError(Exception):
    """A program was stopped before its end, or not begun; what it keeps, it goes on from."""


class Processes:
    """Runs programs; of several threads, if need be."""

    def __init__(self, logs: Path | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        """Begin with none.

        Args:
            logs: folder of a log for each name, of all that programs say on their standard error; none: it is shown.
            grace_seconds: from the moment that programs are asked to stop; then they are killed.
        """
        self._logs, self._grace_seconds = logs, grace_seconds
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether programs were asked to stop."""
        return self._stop.is_set()

    def run(self, command: Sequence[str], name: str, threads: int | None = None) -> dict[str, Any]:
        """Run a command of the interpreter that prints JSON, as `output` does, and return that."""
        document: dict[str, Any] = json.loads(self.output(command, name, threads))
        return document

    def output(self, command: Sequence[str], name: str, threads: int | None = None) -> bytes:
        """Run a command of the interpreter to its end.

        Args:
            command: without the interpreter; keeps what it has on SIGTERM.
            name: of its log.
            threads: that compute; none: as many as the program takes by itself.

        Returns:
            What it prints.

        Raises:
            StoppedError: `stop` was called, before it began or while it ran.
            subprocess.CalledProcessError: it failed, and has said why.
        """
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with self._log(name) as log, self._lock:
            if self._stop.is_set():
                raise StoppedError
            # In a session of its own Ctrl-C reaches it by way of `stop`, and once.
            process = subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
            )
            self._running.add(process)
        try:
            told, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
            if self._stop.is_set():
                _kill(process)  # what it has begun itself
        if process.returncode and self._stop.is_set():
            raise StoppedError
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return told

    def stop(self) -> None:
        """Ask every program to stop, and begin no other; one that does not stop in time is killed.

        A program is asked alone: what it has begun itself may be what it waits for before it stops. (PyTorch 2.11
        waits without end for a process that compiles and was terminated,
        https://github.com/pytorch/pytorch/pull/189290.)
        """
        with self._lock:
            self._stop.set()
            running = list(self._running)
        for process in running:
            process.terminate()
        timer = threading.Timer(self._grace_seconds, _kill, running)
        timer.daemon = True
        timer.start()

    @contextmanager
    def _log(self, name: str) -> Iterator[IO[bytes] | None]:
        if self._logs is None:
            yield None
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{name}.log").open("ab") as log:  # what is gone on with has one
            yield log


def _kill(*processes: "subprocess.Popen[bytes]") -> None:
    """Kill all that is left of programs' sessions."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def stopping(processes: Processes, minutes: float | None) -> Iterator[Processes]:
    """Have processes stopped after some minutes, and by Ctrl-C and SIGTERM, which then end the program."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        threading.Thread(target=processes.stop).start()  # it may have to wait for what was interrupted here

    timer = threading.Timer(60 * (minutes or 0), processes.stop)
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    if minutes:
        timer.start()
    try:
        yield processes
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
