"""The C++ operators, compiled once per machine and version of PyTorch."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("tree_attention.cpp")
# What PyTorch's own AVX-512 kernels need of a CPU; "native" would tie a shared cache to one CPU.
_FLAGS = "-std=c++20 -O3 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -fopenmp -fPIC -shared"


@functools.cache
def operators() -> Any:
    """``torch.ops.megatron_pg_cpu``; compiles (some 10 seconds) unless a cache has it.

    The cache is ``TORCH_EXTENSIONS_DIR`` or ``~/.cache/torch_extensions``. Processes that start
    together wait for one of them.

    Raises:
        RuntimeError: if the compiler fails, with what it said.
    """
    torch.ops.load_library(compiled())
    return torch.ops.megatron_pg_cpu


def compiled_path() -> Path:
    """Where the library of this source, compiler and PyTorch is, once it is compiled."""
    key = "\0".join([*_command(), torch.__version__, _SOURCE.read_text()])
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(folder).expanduser() / "megatron_pg" / f"tree_attention-{digest}.so"


def compiled() -> Path:
    """``compiled_path()``, with the compiler run if it was not there."""
    path = compiled_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed process lets go of its lock, and only a whole library gets its name.
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(path)
    return path


def compiler() -> list[str]:
    """The C++ compiler and its own arguments: ``CXX``, or ``c++``."""
    return shlex.split(os.environ.get("CXX") or "c++")


# What the source needs beyond C++: vectors and shuffles as GCC has them, its headers, OpenMP.
_PROBE = """
#include <immintrin.h>
#include <omp.h>
#include <vector>
typedef float Vector __attribute__((vector_size(64)));
typedef int Indices __attribute__((vector_size(64)));
Vector probe(Vector a, Vector b, Indices i) {
    return __builtin_shuffle(a, b, i) + float(omp_get_max_threads());
}
"""


def compiler_refusal() -> str | None:
    """Why the compiler cannot make the operators; None when it can, or they are in the cache."""
    return _compiler_refusal(tuple(_command()), os.environ.get("TORCH_EXTENSIONS_DIR"))


@functools.cache
def _compiler_refusal(command: tuple[str, ...], folder: str | None) -> str | None:
    """Asked once: a few lines of the same kind, which take the compiler part of a second."""
    if compiled_path().exists():
        return None
    if shutil.which(command[0]) is None:
        return f"needs GCC, found no {command[0]} (CXX names another compiler)"
    with tempfile.TemporaryDirectory() as scratch:
        library = f"{scratch}/probe.so"
        result = subprocess.run(
            [*command, "-x", "c++", "-", "-o", library],
            input=_PROBE,
            capture_output=True,
            text=True,
        )
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    said = errors[0].strip() if errors else f"exit code {result.returncode}"
    return f"needs GCC 10 or newer, {command[0]} fails ({said}); CXX names another compiler"


def _command() -> list[str]:
    return [*compiler(), *_FLAGS.split()]


def _compile(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # The compiler of a killed process may still write to its own.
    partial = library.with_suffix(f".{os.getpid()}.partial")
    libraries = ["-ltorch_cpu", "-lc10"]
    command = [*_command(), abi, *folders, str(_SOURCE), "-o", str(partial), *libraries]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"attention backend 'cpu_fused' could not be compiled by\n  {' '.join(command)}\n"
            f"{result.stderr.strip()}\nUse backend='cpu', or name another compiler in CXX"
        )
    partial.replace(library)
