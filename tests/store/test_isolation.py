import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from store import isolation
from store.isolation import ChildError, run_isolated

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded by /proc, on Linux only")
MANY_FILES = 1100
ROOT = Path(__file__).parents[2]


def own_pid() -> bytes:
    return str(os.getpid()).encode()


def crash() -> bytes:
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
    return b""


def refusal(function: Callable[[], bytes], cpu_seconds: float = 10.0) -> str:
    with pytest.raises(ChildError) as caught:
        run_isolated(function, cpu_seconds)
    return str(caught.value)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def assert_reaped(process: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)  # a zombie would still take signals


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 65536, 20_000_000])
def test_an_answer_of_any_size_arrives_whole(num_bytes: int) -> None:
    answer = np.random.default_rng(num_bytes).bytes(num_bytes)
    assert run_isolated(lambda: answer, 10.0) == answer


def test_the_function_runs_in_a_process_of_its_own_that_is_gone_afterwards() -> None:
    process = int(run_isolated(own_pid, 10.0))
    assert process != os.getpid()
    assert_reaped(process)


def test_what_the_function_changes_is_lost() -> None:
    changed = [1]
    run_isolated(lambda: changed.append(2) or b"", 10.0)  # type: ignore[func-returns-value]
    assert changed == [1]


def _raise(error: BaseException) -> bytes:
    raise error


def _overflow() -> bytes:
    return _overflow()


@pytest.mark.parametrize(
    "function",
    [
        lambda: _raise(ValueError("no")),
        lambda: _raise(KeyboardInterrupt()),
        lambda: _raise(SystemExit(0)),
        lambda: os._exit(0),
        lambda: os._exit(3),
        lambda: "no bytes",
        _overflow,
    ],
    ids=["exception", "interrupt", "exit", "silent exit", "exit with a status", "no bytes", "endless recursion"],
)
def test_a_child_that_does_not_answer_has_failed(function: Callable[[], bytes]) -> None:
    assert refusal(function) == "it failed"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
def test_a_crash_is_named_by_its_signal(number: signal.Signals) -> None:
    assert refusal(lambda: os.kill(os.getpid(), number) or b"") == f"it crashed with {number.name}"  # type: ignore[func-returns-value]


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="macOS has no real-time signals")
def test_a_signal_without_a_name_has_a_number() -> None:
    number = int(signal.SIGRTMIN) + 2
    assert refusal(lambda: os.kill(os.getpid(), number) or b"") == f"it crashed with signal {number}"  # type: ignore[func-returns-value]


def test_a_wrong_memory_access_of_a_c_library_is_a_crash() -> None:
    message = refusal(lambda: ctypes.memset(1, 0, 1))  # type: ignore[arg-type, return-value]
    assert message in {"it crashed with SIGSEGV", "it crashed with SIGBUS"}


def test_an_endless_loop_ends_when_its_processor_time_is_over() -> None:
    def loop() -> NoReturn:
        while True:
            pass

    started = time.monotonic()
    assert refusal(loop, 0.05) == "it took too much processor time"
    assert time.monotonic() - started < 10


@LINUX
def test_a_huge_allocation_fails() -> None:
    # In an interpreter of its own: one that has had much memory may keep it, and its child then needs no more.
    code = (
        "import sys; from store.isolation import _MEMORY_BYTES, run_isolated; "
        "print(len(run_isolated(lambda: bytes(int(_MEMORY_BYTES * float(sys.argv[1]))), 10.0)))"
    )
    done = [
        subprocess.run([sys.executable, "-c", code, share], cwd=ROOT, capture_output=True, text=True, check=False)
        for share in ("0.125", "1.01")
    ]
    assert done[0].stdout.strip() == str(isolation._MEMORY_BYTES // 8)
    assert "ChildError: it failed" in done[1].stderr


def test_a_child_that_sleeps_is_killed_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def sleep() -> bytes:
        (tmp_path / "pid").write_bytes(own_pid())
        time.sleep(60)
        return b""

    monkeypatch.setattr(isolation, "_WALL_SECONDS", 1.0)
    assert refusal(sleep) == "no answer within 1 s"
    assert_reaped(int((tmp_path / "pid").read_bytes()))


def test_an_interrupt_of_the_parent_kills_the_child(tmp_path: Path) -> None:
    def sleep() -> bytes:
        (tmp_path / "pid").write_bytes(own_pid())
        os.kill(os.getppid(), signal.SIGALRM)
        time.sleep(60)
        return b""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    files = open_files()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_isolated(sleep, 10.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_reaped(int((tmp_path / "pid").read_bytes()))
    assert open_files() == files


@pytest.mark.parametrize("answer", [b"", b"\x08", bytes([8, 0, 0, 0, 0, 0, 0, 0]) + b"seven b"])
def test_half_an_answer_is_none(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(function: object, write_end: int, cpu_seconds: float) -> NoReturn:
        os.write(write_end, answer)
        os._exit(0)

    monkeypatch.setattr(isolation, "_run_child", cut_off)
    assert refusal(bytes) == "it failed"


def test_no_file_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    for _ in range(3):
        run_isolated(own_pid, 10.0)
        refusal(crash)
    assert open_files() == before

    def no_process() -> NoReturn:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_process)
    with pytest.raises(BlockingIOError):
        run_isolated(own_pid, 10.0)
    assert open_files() == before


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> bytes:
        os.write(1, b"out")
        os.write(2, b"error")
        return crash()

    assert refusal(noisy) == "it crashed with SIGSEGV"
    assert capfd.readouterr() == ("", "")


def test_no_file_on_which_the_parent_waits_is_written_twice(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        file.write("once")  # still in the buffer when the child is made
        run_isolated(own_pid, 10.0)
    assert (tmp_path / "file").read_text() == "once"


def test_threads_may_each_have_a_child() -> None:
    def answer(number: int) -> bytes:
        return run_isolated(lambda: bytes([number]) * 300_000, 10.0)

    before = warnings.filters[:]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, range(12))) == [bytes([number]) * 300_000 for number in range(12)]
    assert warnings.filters == before


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * MANY_FILES:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * MANY_FILES), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(MANY_FILES)]
    yield
    for file in files:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_more_than_a_thousand_files_may_be_open() -> None:
    assert run_isolated(lambda: b"answer", 10.0) == b"answer"


def test_a_process_without_standard_streams_gets_its_answer() -> None:
    process = os.fork()
    if process == 0:
        for file in (0, 1, 2):
            os.close(file)
        try:
            os._exit(run_isolated(lambda: b"answer", 10.0) != b"answer")
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


def test_an_answer_is_whole_though_another_process_holds_the_pipe_open() -> None:
    def leave_a_process() -> bytes:
        process = os.fork()  # as a thread may do between the making of the pipe and its closing
        if process == 0:
            time.sleep(5)
            os._exit(0)
        return str(process).encode()

    started = time.monotonic()
    process = int(run_isolated(leave_a_process, 10.0))
    try:
        assert time.monotonic() - started < 4
    finally:
        os.kill(process, signal.SIGKILL)
