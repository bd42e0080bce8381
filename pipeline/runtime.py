"""Device, precision, memory and versions: what a run depends on beside its settings."""

import ctypes
import importlib.metadata
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.errors import PipelineError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that this process has held so far, in bytes.

    `resident_bytes` counts everything in RAM, libraries and mapped file pages included; `device_bytes` is
    what PyTorch allocated on the GPU, 0 without one.
    """

    resident_bytes: int
    device_bytes: int


def resolve_device(name: str) -> torch.device:
    """Choose where to compute.

    Args:
        name: `auto` (CUDA, else Apple's MPS, else the CPU), or a PyTorch device such as `cuda:1`.

    Returns:
        The device.

    Raises:
        PipelineError: an unknown name, or a device that is absent.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise PipelineError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PipelineError(
            f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices. Pass --device cpu, or install "
            "a PyTorch build and a driver that match the GPU."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PipelineError("device 'mps': PyTorch sees no Apple GPU. Pass --device cpu.")
    return device


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """Choose the arithmetic of the heavy parts.

    Args:
        name: `auto` takes bfloat16 where the hardware computes in it, else float32.
        device: where it will run.

    Returns:
        `torch.float32` or `torch.bfloat16`.
    """
    if name == "auto":
        name = "bfloat16" if _has_bfloat16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def fits_device(num_bytes: int, device: torch.device) -> bool:
    """Tell whether data of this size may live on a GPU for a whole run: in a quarter of what is free there.

    Pixels and embeddings ask one after the other, and training itself wants room.
    """
    return device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // 4


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next batch, where the C library is glibc.

    By default blocks of a few megabytes go back to the system and are taken, page by page, for the next batch: in
    thousands of page faults, which cost 5 % of a small model's forward pass on a CPU.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older ones keep blocks of at most 32 MiB; refused, they must keep their own rules.
        if mallopt(_M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(_M_MMAP_THRESHOLD, 2**25):
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def full_float32() -> AbstractContextManager[None]:
    """Let float32 mean float32 inside a `with`: cuDNN's convolutions would round their input to TF32."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def seed_device(seed: int, device: torch.device) -> None:
    """Seed what draws for a device.

    `torch.manual_seed` seeds every kind of device there may be, which takes a millisecond where there is none of them.

    Args:
        seed: of 64 bits.
        device: a CPU's generator alone is seeded, or all.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def peak_memory(device: torch.device) -> PeakMemory:
    """Return this process's peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident_bytes = peak if sys.platform == "darwin" else peak * 1024
    device_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return PeakMemory(resident_bytes, device_bytes)


@contextmanager
def batch_must_fit(batch_size: int, what: str, smallest: int = 1, option: str = "--batch-size") -> Iterator[None]:
    """Turn a failed allocation into advice.

    Args:
        batch_size: images that are in memory at once.
        what: who allocated, e.g. `the teacher`.
        smallest: the smallest batch that could be advised.
        option: that would make them fewer.

    Raises:
        PipelineError: memory ran out inside the block.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # Of the CPU, of CUDA's own calls, of its libraries, and of Apple's GPUs.
        signs = ("allocate memory", "out of memory", "ALLOC_FAILED", "Invalid buffer size")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(
            sign in str(error) for sign in signs
        ):
            raise
        half = max(batch_size // 2, smallest)
        advice = f"Try {option} {half}." if half < batch_size else "A smaller model is needed."
        raise PipelineError(f"out of memory: {what} at batch size {batch_size}. {advice}") from None


def software_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of this program, Python and some packages, by name."""
    versions = {"python": platform.python_version()}
    for package in ("clip-embed-kd", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
