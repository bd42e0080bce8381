"""Device, precision, memory and versions."""

import importlib.metadata
import platform
import resource
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.runtime import (
    PeakMemory,
    Precision,
    batch_must_fit,
    peak_memory,
    resolve_device,
    resolve_precision,
    seed_device,
    software_versions,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize(("name", "present"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_an_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, present: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(PipelineError) as error:
        resolve_device(name)
    assert str(error.value) == (
        f"device {name!r}: PyTorch sees {present} CUDA devices. Pass --device cpu, or install "
        "a PyTorch build and a driver that match the GPU."
    )


def test_an_absent_apple_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PipelineError) as error:
        resolve_device("mps")
    assert str(error.value) == "device 'mps': PyTorch sees no Apple GPU. Pass --device cpu."


@pytest.mark.parametrize(
    "name",
    [
        "tpu",
        "",
        "cuda:x",
        "cuda:-1",
        "meta",
        "xpu",
    ],
)
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(PipelineError) as error:
        resolve_device(name)
    assert str(error.value) == f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps."


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_precision_is_what_the_cpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_auto_precision_is_float32_where_pytorch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_on_a_gpu_counts_no_emulation(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_precision("auto", CUDA) == expected


@pytest.mark.parametrize(("name", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_precision_that_is_asked_for_is_taken(name: Precision, expected: torch.dtype, device: torch.device) -> None:
    assert resolve_precision(name, device) == expected


def test_peak_memory_counts_this_process() -> None:
    memory = peak_memory(CPU)
    assert 10_000_000 < memory.resident_bytes < 1_000_000_000_000
    assert memory.device_bytes == 0


@pytest.mark.parametrize(("system", "expected"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_knows_the_units_of_the_system(monkeypatch: pytest.MonkeyPatch, system: str, expected: int) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", system)
        patched.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
        patched.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
        memory = peak_memory(CUDA)
    assert memory == PeakMemory(resident_bytes=expected, device_bytes=7)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 4 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [(65, "Try --batch-size 32."), (2, "Try --batch-size 1."), (1, "A smaller model is needed.")],
)
def test_a_failed_allocation_becomes_advice(failure: Exception, batch_size: int, advice: str) -> None:
    with pytest.raises(PipelineError) as error, batch_must_fit(batch_size, "the teacher"):
        raise failure
    assert str(error.value) == f"out of memory: the teacher at batch size {batch_size}. {advice}"


@pytest.mark.parametrize("failure", [RuntimeError("shapes differ"), ValueError("allocate memory"), KeyboardInterrupt()])
def test_other_errors_pass_as_they_are(failure: BaseException) -> None:
    with pytest.raises(type(failure)) as error, batch_must_fit(8, "the teacher"):
        raise failure
    assert error.value is failure


def test_a_batch_that_fits_passes() -> None:
    done: list[Any] = []
    with batch_must_fit(8, "the teacher"):
        done.append(True)
    assert done == [True]


def test_versions_are_those_installed() -> None:
    versions = software_versions(("torch", "no-such-package"))
    assert list(versions) == ["python", "clip-embed-kd", "torch", "no-such-package"]
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["no-such-package"] == "not installed"


def test_a_device_is_seeded_as_pytorch_seeds_all() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    seed_device(7, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_for_a_gpu_all_generators_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    seed_device(7, CUDA)
    assert seeds == [7]
