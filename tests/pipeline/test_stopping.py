"""A first signal is noted, a second one obeyed."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.stopping import StopRequest


@pytest.fixture(autouse=True)
def obeyed() -> Iterator[list[int]]:
    """Take over SIGTERM, and SIGINT, which a background job ignores; the list has what arrived of SIGTERM."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield arrived
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupted)


def test_the_first_signal_is_noted_and_the_second_obeyed(obeyed: list[int]) -> None:
    with StopRequest("the batch in hand") as stop:
        stop.obey()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, obeyed) == (True, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert obeyed == [signal.SIGTERM]
        with pytest.raises(SystemExit) as left:
            stop.obey()
    assert left.value.code == 143


def test_the_signal_is_given_back(obeyed: list[int]) -> None:
    with StopRequest("the batch in hand") as stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.requested, obeyed) == (False, [signal.SIGTERM])


def test_other_threads_take_no_signals(obeyed: list[int]) -> None:
    def work() -> None:
        with StopRequest("the batch in hand") as stop:
            stop.obey()
            done.append(stop.requested)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (done, obeyed) == ([False], [signal.SIGTERM])


def test_ctrl_c_is_noted_where_that_is_wanted() -> None:
    with StopRequest("the step in hand", (signal.SIGINT, signal.SIGTERM)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            stop.obey()
        with pytest.raises(KeyboardInterrupt):  # the second one is Python's own again
            signal.raise_signal(signal.SIGINT)
