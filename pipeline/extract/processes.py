"""The processes that share one extraction: started by torchrun or `accelerate launch`, or one alone."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import PipelineError


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
        """Wait until every process has come here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Find out who shares the work, from the environment that the launcher set.

    Args:
        device: where to compute; `cuda` without a number becomes this process's own GPU.

    Returns:
        The processes, and this one's device.

    Raises:
        PipelineError: several processes were launched, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1), device
    try:
        from accelerate import PartialState
    except ModuleNotFoundError:
        raise PipelineError(
            "several processes need accelerate, which is not installed: pip install 'clip-embed-kd[extract]'"
        ) from None
    state: Any = PartialState(cpu=device.type == "cpu")
    if device == torch.device("cuda"):
        device = torch.device("cuda", state.local_process_index)
    return Processes(state.process_index, state.num_processes, state), device
