"""Run a parser that may crash in a child process, so that a hostile file cannot take the program with it.

The child is a fork: it costs milliseconds, where a fresh interpreter costs 0.2 s. It may take a bounded amount
of memory and of processor time, and answers with bytes, which the parent checks like any other input.
"""

import faulthandler
import fcntl
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_MEMORY_BYTES = 256 * 1024 * 1024  # beyond what the process has mapped already; six copies of a manifest
_WALL_SECONDS = 60.0  # a slow disk is no crime
_LENGTH_BYTES = 8
# One at a time: of several threads that fork, the library filelock refuses all but one. A child never takes it.
_FORKING = threading.Lock()


class ChildError(Exception):
    """The child died before it had answered; the text says how."""


def run_isolated(function: Callable[[], bytes], cpu_seconds: float) -> bytes:
    """Call a function in a child process.

    Args:
        function: what to call; what it changes is lost with the child.
        cpu_seconds: processor time that it may take.

    Returns:
        What the function returned.

    Raises:
        ChildError: it crashed, raised an exception, or took too much time or memory.
        OSError: no process could be started.
    """
    read_end, write_end = os.pipe()
    try:
        try:
            # Python 3.12 may warn of threads. The child runs the parser alone, and h5py holds its lock across a fork.
            with _FORKING:
                process = os.fork()
            if process == 0:  # pragma: no cover (in the child)
                _run_child(function, write_end, cpu_seconds)
        finally:
            os.close(write_end)
        return _receive(read_end, process)
    finally:
        os.close(read_end)


def _run_child(function: Callable[[], bytes], write_end: int, cpu_seconds: float) -> NoReturn:  # pragma: no cover
    # Coverage does not follow a process that ends with _exit; tests see what this does from outside.
    try:
        write_end = fcntl.fcntl(write_end, fcntl.F_DUPFD, 3)  # in a process without standard streams it is one of them
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)  # HDF5 would print what it died of
        faulthandler.disable()  # so would Python's fault handler, into a file of its own
        _limit(resource.RLIMIT_CORE, 0)
        status = Path("/proc/self/statm")
        if status.exists():
            mapped_bytes = int(status.read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, mapped_bytes + _MEMORY_BYTES)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # kills; finer than RLIMIT_CPU's whole seconds
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = function()
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(len(answer).to_bytes(_LENGTH_BYTES, "little") + answer)
    finally:
        os._exit(1)  # no exit handler of the parent runs here; whether it answered is all that counts


def _limit(kind: int, value: int) -> None:  # pragma: no cover (in the child)
    soft, hard = resource.getrlimit(kind)
    bounds = [bound for bound in (soft, value) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min(bounds), hard))


def _receive(pipe: int, process: int) -> bytes:
    answer = bytearray()
    deadline = time.monotonic() + _WALL_SECONDS
    waiting = select.poll()  # select.select refuses the thousandth open file
    waiting.register(pipe, select.POLLIN)
    try:
        while waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
            part = os.read(pipe, 1 << 20)
            if not part:
                break
            answer += part
            if _is_whole(answer):  # another child of this process may hold the pipe open
                break
        else:
            raise ChildError(f"no answer within {_WALL_SECONDS:.0f} s")
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(process, 0)[1]
    if not _is_whole(answer):
        raise ChildError(_cause(status))
    return bytes(answer[_LENGTH_BYTES:])


def _is_whole(answer: bytearray) -> bool:
    length = int.from_bytes(answer[:_LENGTH_BYTES], "little")
    return len(answer) >= _LENGTH_BYTES and len(answer) - _LENGTH_BYTES == length


def _cause(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return "it failed"
    number = os.WTERMSIG(status)
    if number == signal.SIGPROF:
        return "it took too much processor time"
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"it crashed with {name}"
