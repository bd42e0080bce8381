"""One step of training: forward and backward pass by parts of a batch, compiled where that is asked for."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pipeline.distill.method import LOSSES, Batch
from pipeline.errors import first_line
from pipeline.progress import LOGGER
from pipeline.runtime import full_float32

_GRAPH_TRIALS = 3  # a CUDA graph is warmed up for, captured, replayed


class ForwardBackward:
    """Computes losses and gradients of a batch."""

    def __init__(
        self, method: nn.Module, precision: torch.dtype, micro_batch: int | None, compiled_size: int | None = None
    ) -> None:
        """Prepare; compilation happens with the first batch of that size.

        Args:
            method: `Method`, or what takes and returns the same; on its device, in training mode when called.
            precision: of the student's forward pass.
            micro_batch: images in memory at once; none: the whole batch.
            compiled_size: use `torch.compile` for batches of so many images; where it fails, say why and go on
                without. None: never.
        """
        self._method, self.precision, self.micro_batch = method, precision, micro_batch
        # A short last batch would be compiled for on its own, for a minute, and then come once an epoch.
        self._compiled_size = compiled_size
        self._compiled: Callable[..., Tensor] | None = None
        self._has_graphs = False
        self.compile_seconds = 0.0  # what compiling took so far

    @property
    def compiled(self) -> bool:
        """Whether steps are, or will be, compiled."""
        return self._compiled_size is not None

    def __call__(self, batch: Batch) -> Tensor:
        """Add the gradients of a batch's loss to what the parameters have.

        Args:
            batch: on the method's device.

        Returns:
            The losses named in `LOSSES`, detached.
        """
        if len(batch.pixels) == self._compiled_size and self._compiled is None:
            self._compile(batch)
        if len(batch.pixels) == self._compiled_size and self._compiled is not None:
            return self._run(self._compiled, batch)
        return self._run(self._method, batch)

    def _run(self, method: Callable[..., Tensor], batch: Batch) -> Tensor:
        losses = torch.zeros(len(LOSSES), device=batch.pixels.device)
        for start, stop in self._parts(len(batch.pixels)):
            if self._has_graphs and method is self._compiled:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with full_float32():
                with torch.autocast(batch.pixels.device.type, self.precision, enabled=self.precision != torch.float32):
                    part = method(batch.part(start, stop), batch.samples, len(batch.pixels))
                part[0].backward()  # type: ignore[no-untyped-call]
            losses += part.detach()
        return losses

    def _parts(self, size: int) -> Iterator[tuple[int, int]]:
        step = self.micro_batch or size
        starts = list(range(0, size, step))
        if len(starts) > 1 and size - starts[-1] == 1:
            starts.pop()  # one image has no batch statistics: it goes with those before it
        yield from zip(starts, [*starts[1:], size], strict=True)

    def _compile(self, batch: Batch) -> None:
        kept = [buffer.clone() for buffer in self._method.buffers()]
        seed = torch.initial_seed()
        on_gpu = batch.pixels.device.type == "cuda"
        # CUDA graphs: a small student's step is shorter than the launches of its kernels. Gradients that a graph has
        # made are overwritten by its next replay, so they cannot be added up over parts.
        parts = len(list(self._parts(len(batch.pixels))))
        mode = "reduce-overhead" if on_gpu and parts == 1 else None
        self._has_graphs = mode is not None
        LOGGER.info("Compiling the step, which takes a minute or so.")
        start = time.monotonic()
        try:
            self._compiled = torch.compile(self._method, mode=mode, dynamic=False)
            for _ in range(_GRAPH_TRIALS if mode else 1):
                self._run(self._compiled, batch)
                self._method.zero_grad(set_to_none=True)
        except Exception as error:  # whatever a compiler's absence or a model it cannot take may raise
            self._compiled_size = self._compiled = None
            torch.compiler.reset()  # what was captured of CUDA graphs holds memory
            LOGGER.info("The step is not compiled (%s): going on without.", first_line(error)[:300])
        # The trial leaves no trace, not even in what dropout draws: a resumed run has it at another step.
        for buffer, value in zip(self._method.buffers(), kept, strict=True):
            buffer.copy_(value)
        self._method.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        self.compile_seconds += time.monotonic() - start
