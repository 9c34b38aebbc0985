"""What CUDA backends refuse, on machines without CUDA: stub packages and devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.attention import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    AttentionKind,
    make_attention_plan,
    select_backend,
)
from megatron_pg.attention.backends.flash_attn import package_refusal
from megatron_pg.attention.kinds import Scores
from megatron_pg.tree import ResidentSpans

INTERFACE = "def _flash_attn_varlen_forward(): ...\ndef _flash_attn_varlen_backward(): ...\n"


def inputs(**changes: object) -> AttentionInputs:
    fields = dict(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=64)
    return AttentionInputs(**(fields | dict(num_heads=4, num_kv_heads=2) | changes))


@pytest.fixture
def device(monkeypatch) -> Callable[..., None]:
    """A CUDA device of the given compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)

    pretend(9, 0)
    return pretend


@pytest.fixture
def install(monkeypatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Puts a package flash_attn of the given files on the path."""

    def write(**files: str) -> None:
        folder = tmp_path / "flash_attn"
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]
        package_refusal.cache_clear()

    forget()
    yield write
    forget()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_a_package_that_fits_is_picked_for_what_flash_does_not_compute(
    device, install, capability
) -> None:
    install(__init__='__version__ = "2.8.3.post1"', flash_attn_interface=INTERFACE)
    device(*capability)
    assert select_backend(inputs()).name == "flash"
    assert select_backend(inputs(kind=AttentionKind(softcap=5.0))).name == "flash_attn"
    assert select_backend(inputs(), "flash_attn").name == "flash_attn"


PACKAGES = {
    "none": ({}, "the flash-attn package is not installed"),
    "flash-attn-4 alone, a namespace package": (
        dict(cute="kernels = True"),
        r"without kernels, as flash-attn-4 alone brings; install a flash-attn >= 2\.7",
    ),
    "built for another PyTorch": (
        dict(__init__='raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104")'),
        r"cannot import flash-attn \(ImportError: flash_attn_2_cuda.so: undefined symbol",
    ),
    "kernels built for another PyTorch": (
        dict(
            __init__='__version__ = "2.8.3"',
            flash_attn_interface='raise ImportError("undefined symbol: _ZN3c104")',
        ),
        r"cannot import flash-attn \(ImportError: undefined symbol.*built for this PyTorch",
    ),
    "no library of CUDA": (
        dict(__init__='raise OSError("libcudart.so.12: cannot open shared object file")'),
        r"\(OSError: libcudart.so.12",
    ),
    "a package it needs is missing": (
        dict(__init__='__version__ = "2.8.3"', flash_attn_interface="import no_such_package"),
        r"\(ModuleNotFoundError: No module named 'no_such_package'\)",
    ),
    "broken": (dict(__init__="1 / 0"), r"\(ZeroDivisionError: division by zero\)"),
    "2.6": (
        dict(__init__='__version__ = "2.6.3"', flash_attn_interface=INTERFACE),
        r"finds flash-attn 2\.6\.3; install a flash-attn >= 2\.7, < 3",
    ),
    "1.9": (
        dict(__init__='__version__ = "1.9.1"', flash_attn_interface=INTERFACE),
        r"finds flash-attn 1\.9\.1; install",
    ),
    "3.7": (
        dict(__init__='__version__ = "3.7.0"', flash_attn_interface=INTERFACE),
        r"finds flash-attn 3\.7\.0; install",
    ),
    "no version": (dict(__init__="", flash_attn_interface=INTERFACE), "finds flash-attn unknown"),
    "other functions": (
        dict(__init__='__version__ = "2.9.0"', flash_attn_interface="x = 1"),
        "finds flash-attn 2.9.0 without _flash_attn_varlen_forward",
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_does_not_fit_is_passed_over(device, install, name: str) -> None:
    files, message = PACKAGES[name]
    if files:
        install(**files)
    assert select_backend(inputs()).name == "flash"
    for named in ("flash_attn", "auto"):
        with pytest.raises(ValueError, match=message):
            select_backend(inputs(kind=AttentionKind(softcap=5.0)), named)
    assert package_refusal.cache_info().misses == 1, "a package is looked at once"


@pytest.mark.parametrize("backend", ["flash3", "flash", "flash_attn", "auto"])
@pytest.mark.parametrize(
    ("changes", "capability", "message"),
    [
        (dict(head_dim=4), (9, 0), "head_dim in multiples of 8 up to 256, got 4"),
        (dict(head_dim=60), (9, 0), "head_dim in multiples of 8 up to 256, got 60"),
        (dict(head_dim=100), (9, 0), "head_dim in multiples of 8 up to 256, got 100"),
        (dict(head_dim=264), (9, 0), "head_dim in multiples of 8 up to 256, got 264"),
        (dict(head_dim=224), (8, 9), "head_dim up to 192, or 232 to 256, on this GPU, got 224"),
        (dict(head_dim=200), (12, 0), "head_dim up to 192, or 232 to 256, on this GPU, got 200"),
        (dict(dtype=torch.float32), (9, 0), "takes torch.bfloat16, torch.float16, got torch.fl"),
        (dict(dtype=torch.float64), (9, 0), "takes torch.bfloat16, torch.float16, got torch.fl"),
        (dict(dtype=torch.float8_e5m2), (9, 0), "takes torch.bfloat16, torch.float16, got torc"),
        ({}, (7, 5), r"needs compute capability 8.0 \(Ampere\) or newer, cuda:0 has 7.5"),
        (dict(dtype=torch.float16), (7, 0), r"needs compute capability 8.0 .* cuda:0 has 7.0"),
        (dict(device=torch.device("xpu")), (9, 0), "needs tensors on cuda, got xpu"),
    ],
)
def test_what_the_kernels_do_not_take(
    device, install, backend, changes, capability, message
) -> None:
    install(__init__='__version__ = "2.8.3"', flash_attn_interface=INTERFACE)
    device(*capability)
    with pytest.raises(ValueError, match=message):
        select_backend(inputs(**changes), backend)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_the_kernels_take(device, head_dim, capability) -> None:
    device(*capability)
    for dtype in (torch.bfloat16, torch.float16):
        assert select_backend(inputs(head_dim=head_dim, dtype=dtype), "flash").name == "flash"


def test_devices_that_are_none(device, monkeypatch) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    with pytest.raises(ValueError, match="FlashAttention, which this PyTorch was built without"):
        select_backend(inputs(), "flash")
    monkeypatch.setattr("torch.version.hip", "6.4")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        select_backend(inputs(), "flash")
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, PyTorch finds none"):
        select_backend(inputs())


@pytest.mark.parametrize(
    "changes",
    [dict(num_heads=6, num_kv_heads=4), dict(num_heads=0), dict(num_kv_heads=0), dict(head_dim=0)],
)
def test_heads_that_no_attention_has(changes) -> None:
    with pytest.raises(ValueError, match="must be a multiple of num_kv_heads"):
        inputs(**changes)


@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_passes_of_one_query_are_not_taken_for_decoding(monkeypatch, install, backend) -> None:
    """FlashAttention-2 swaps heads and sequences then, and counts on a query in each of them."""
    lone = [
        PrefixTree(
            segment_lens=np.array([1]),
            segment_parents=np.array([-1]),
            sample_segments=np.array([0]),
            resident_lens=np.array([3]),
        )
    ] * 2
    # The first token sees keys 0..2 of the prefix row, the second 5..7: a gap of two keys.
    spans = ResidentSpans(0, np.array([[0, 1], [1, 2]]), np.array([[0, 3], [5, 8]]))
    chosen, cpu = ATTENTION_BACKENDS[backend], torch.device("cpu")
    passes = chosen.prepare(make_attention_plan(pack_trees(lone, 1, [spans])), cpu).passes
    assert passes[-1].arguments.cu_seqlens_q.diff().tolist() == [1, 0, 1]
    bounds: list[int] = []

    def forward(q, k, v, cu_q, cu_kv, max_q, max_kv, *args, **kwargs):
        bounds.append(max_q)
        return q, q[..., 0].t()

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward, raising=False)
    install(__init__="", flash_attn_interface=INTERFACE)
    monkeypatch.setattr("flash_attn.flash_attn_interface._flash_attn_varlen_forward", forward)
    x = torch.zeros(8, 2, 8)
    for p in passes:
        chosen.forward(x[p.queries], x, x, p.arguments, Scores(1.0))
    assert bounds == [2, 2]
    longer = make_attention_plan(pack_trees([PrefixTree.from_group(3, [4, 5])]))
    assert [p.arguments.max_seqlen_q for p in chosen.prepare(longer, cpu).passes] == [5, 9]
