"""The processes that share one extraction: started by torchrun or `accelerate launch`, or one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from pipeline.errors import PipelineError, first_line

_LONGEST_WAIT = timedelta(days=7)
_Value = TypeVar("_Value")


class ShareDone(Exception):  # noqa: N818 (no error)
    """This process has done its share of an extraction; another one writes the artifact."""


@dataclass(frozen=True)
class Processes:
    """Who this process is: `rank` of `count`."""

    rank: int
    count: int
    _state: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes the artifact."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            PipelineError: one of them has died.
        """
        if self._state is not None:
            # Not accelerate's barrier, which takes memory on the GPU of this process's number, whatever it computes on.
            with _others_must_live():
                torch.distributed.all_reduce(torch.zeros(1))

    def agree(self, value: _Value) -> _Value:
        """Return what the first process has for a value, once every process has come here.

        Args:
            value: this process's own.

        Raises:
            PipelineError: one of them has died.
        """
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        with _others_must_live():
            values: list[_Value] = broadcast_object_list([value])
        return values[0]


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Find out who shares the work, from the environment that the launcher set.

    Args:
        device: where to compute; `cuda` without a number becomes this process's own GPU.

    Returns:
        The processes, and this one's device.

    Raises:
        PipelineError: several processes were launched, and accelerate is not installed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Processes(0, 1), device
    try:
        from accelerate import PartialState
    except ModuleNotFoundError:
        raise PipelineError(
            "several processes need accelerate, which is not installed: pip install 'clip-embed-kd[extract]'"
        ) from None
    # Processes only wait for each other, which gloo does on any machine and notices the death of another at once. How
    # long they may wait is how much longer one share can take than another.
    try:
        state: Any = PartialState(cpu=True, timeout=_LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise PipelineError(
            f"the processes cannot find each other ({first_line(error)}). Start them with torchrun, or unset "
            "WORLD_SIZE."
        ) from None
    if device == torch.device("cuda"):
        if state.local_process_index >= torch.cuda.device_count():
            raise PipelineError(
                f"process {state.local_process_index} of this machine has no GPU of its own: PyTorch sees "
                f"{torch.cuda.device_count()}. Start fewer processes, or pass --device cuda:0."
            )
        device = torch.device("cuda", state.local_process_index)
    return Processes(state.process_index, state.num_processes, state), device


@contextmanager
def _others_must_live() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PipelineError(
            "another process of this extraction has stopped (its own message says why), so this one stops too. "
            f"The same command goes on from what is finished. [{first_line(error)[:120]}]"
        ) from None
