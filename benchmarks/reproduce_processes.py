"""Programs of the interpreter that run side by side, and can all be asked to stop at once."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any


class StoppedError(Exception):
    """A program was stopped before its end, or not begun; what it keeps, it goes on from."""


class Processes:
    """Runs programs; of several threads, if need be."""

    def __init__(self) -> None:
        """Begin with none."""
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a command of the interpreter to its end.

        Args:
            command: without the interpreter; prints JSON, and keeps what it has on SIGTERM.

        Returns:
            Its JSON.

        Raises:
            StoppedError: `stop` was called, before it began or while it ran.
            subprocess.CalledProcessError: it failed, and has said why.
        """
        with self._lock:
            if self.stopped:
                raise StoppedError
            # In a session of its own Ctrl-C reaches it by way of `stop`, and once.
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, start_new_session=True)
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
        if process.returncode and self.stopped:
            raise StoppedError
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        document: dict[str, Any] = json.loads(told)
        return document

    def stop(self) -> None:
        """Ask every program to stop, and begin no other."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()
