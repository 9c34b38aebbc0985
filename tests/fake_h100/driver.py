"""The library that answers for a CUDA device, and the environment of a process with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

# What headers of the CUDA runtime include that comes with its compiler, which nobody needs here.
_HOST_DEFINES = """
#define __device_builtin__
#define __cudart_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __host__
#define __device__
#define __noinline__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __location__(a)
#define CUDARTAPI
#define CUDARTAPI_CDECL
"""


def missing() -> str | None:
    """Why there is no such library here; None where it can be built."""
    if torch.version.cuda is None:
        return "needs a PyTorch that was built with CUDA"
    if torch.cuda.is_available():
        return "is for machines without a CUDA device"
    if shutil.which("cc") is None:
        return "needs a C compiler"
    if _headers() is None:
        return "needs the CUDA runtime's headers, which its wheel brings"
    return None


def environment(folder: Path) -> dict[str, str]:
    """Compile the library into a folder; the variables of a process that finds it."""
    (folder / "crt").mkdir()
    (folder / "crt/host_defines.h").write_text(_HOST_DEFINES)
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-I{folder}", f"-I{_headers()}"]
    source = Path(__file__).with_name("driver.c")
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    (folder / "libnvidia-ml.so.1").symlink_to(library)
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        # Else asking for the device would keep forked processes from using it.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def is_loaded() -> bool:
    """Whether this process has it."""
    return "libcuda.so.1" in os.environ.get("LD_PRELOAD", "")


def _headers() -> Path | None:
    site = Path(torch.__file__).parent.parent
    found = sorted(site.glob("nvidia/cu*/include/cuda_runtime_api.h"))
    found += sorted(site.glob("nvidia/cuda_runtime/include/cuda_runtime_api.h"))
    return found[0].parent if found else None
