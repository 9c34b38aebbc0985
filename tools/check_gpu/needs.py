"""What the check needs, what of it is here, and what is left out where it is not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Of an NVIDIA toolkit that is on no path.
TOOLKIT = Path("/usr/local/cuda/bin")


@dataclass(frozen=True)
class Need:
    """One package, program or device.

    Attributes:
        name: by which stages name it.
        found: version or place; None where it is missing.
        without: what is left out then.
    """

    name: str
    found: str | None
    without: str


def find_needs() -> list[Need]:
    """Everything that a stage may need, whether it is here or not."""
    return [Need(name, _find(probe), without) for name, probe, without in _PROBES]


def program(name: str) -> str | None:
    """Where a program is: on the path, or in the toolkit's folder."""
    return shutil.which(name) or shutil.which(name, path=str(TOOLKIT))


def _find(probe: Callable[[], str | None]) -> str | None:
    try:
        return probe()
    except Exception as error:  # a broken package counts as missing, and says why
        print(f"check_gpu: {type(error).__name__}: {error}".splitlines()[0])
        return None


def _package(module: str, *distributions: str) -> Callable[[], str | None]:
    """The version of what is found: a package on a path may have no metadata."""

    def probe() -> str | None:
        if importlib.util.find_spec(module) is None:
            return None
        for name in distributions or (module,):
            with suppress(metadata.PackageNotFoundError):
                return metadata.version(name)
        return "of unknown version"

    return probe


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    # FlashAttention's least, and bf16's.
    if capability < (8, 0):
        return None
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    smi = program("nvidia-smi")
    if smi is None:
        return f"{torch.cuda.get_device_name()}, capability {capability}"
    done = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[torch.cuda.current_device()] if lines else torch.cuda.get_device_name()


_PROBES: tuple[tuple[str, Callable[[], str | None], str], ...] = (
    ("torch", _package("torch"), "everything"),
    ("gpu", _gpu, "everything, but for --quick (a GPU of capability 8.0 or newer)"),
    ("numpy", _package("numpy"), "everything"),
    ("triton", _package("triton"), "Triton kernels; attention merges with PyTorch's"),
    (
        "compiler",
        lambda: program("cc") or program("gcc"),
        "Triton kernels, which need a C compiler to be launched",
    ),
    ("pytest", _package("pytest"), "the gpu tests"),
    ("hypothesis", _package("hypothesis"), "the gpu tests"),
    ("xdist", _package("xdist", "pytest-xdist"), "running the gpu tests side by side: slower"),
    (
        "compute-sanitizer",
        lambda: program("compute-sanitizer"),
        "the search for accesses out of bounds",
    ),
    (
        "megatron-core",
        _package("megatron.core", "megatron-core"),
        "the recipe, and all benchmarks",
    ),
    ("rich", _package("rich"), "all benchmarks"),
    ("omegaconf", _package("omegaconf"), "the recipe"),
    ("flash-attn", _package("flash_attn", "flash-attn"), "backend flash_attn"),
    (
        "flash-attn-3",
        _package("flash_attn_interface", "flash-attn-3", "flash_attn_3"),
        "FlashAttention-3 as a package",
    ),
    (
        "flash-linear-attention",
        _package("fla", "flash-linear-attention"),
        "kernels and benchmark of Gated DeltaNet layers, which are not built on CUDA without it",
    ),
    ("mamba-ssm", _package("mamba_ssm", "mamba-ssm"), "kernels of Mamba-2 layers, likewise"),
    (
        "causal-conv1d",
        _package("causal_conv1d", "causal-conv1d"),
        "convolutions of Mamba-2 layers by its kernel: PyTorch's run",
    ),
    (
        "transformer-engine",
        _package("transformer_engine", "transformer-engine"),
        "Transformer Engine's layers: models are of Megatron-Core's local ones",
    ),
)
