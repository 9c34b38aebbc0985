"""The kernels of FLA and mamba_ssm themselves, in Triton's interpreter, against whole samples.

A process of its own, since Triton decides when it is imported, and other tests have neither
package: ``python -m tests.mcore.recurrent_kernels NAME FOLDER`` prints the worst relative errors
and how often a kernel was called.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

Errors = dict[str, float]


def a_row(longest: int) -> Any:
    """Segments longer than a chunk, shorter than the convolution, and a chain."""
    from megatron_pg import PrefixTree, pack_trees

    lens = np.array([longest, 3, 70, 9, 2])
    tree = PrefixTree(lens, np.array([-1, 0, 1, 0, 3]), np.array([1, 2, 3, 4]))
    return pack_trees([tree, PrefixTree.from_group(1, [2, 5])])


def gated_delta_net(folder: Path) -> tuple[Errors, int]:
    """FLA's scan, convolution and norm, against Megatron-Core's layer in PyTorch."""
    _mend_fla(folder)
    from megatron.core.ssm import gated_delta_net as of_megatron

    assert of_megatron.HAVE_FLA, "FLA is not there"
    scan = "chunk_gated_delta_rule"
    # Older ones take no convolution of FLA's.
    names = [n for n in (scan, "causal_conv1d", "l2norm") if hasattr(of_megatron, n)]
    kernels = {name: getattr(of_megatron, name) for name in names}
    assert all(kernel.__module__.startswith("fla.") for kernel in kernels.values())

    from megatron_pg.mcore import cpu
    from megatron_pg.mcore.layers import PrefixGroupedLinearAttention
    from tests.mcore import harness, test_linear_attention

    layout, calls = a_row(66), []
    sizes = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=1)
    with cpu.emulate_cuda():
        harness.initialize(harness.Case())
        stock, ours = test_linear_attention.make_layers(
            torch.float32, **sizes, linear_num_value_heads=2
        )
        x, told = (
            test_linear_attention.normal(n, 0, torch.float32)
            for n in (layout.total_tokens, layout.logical_tokens)
        )
        want = test_linear_attention.written_out(stock, layout, x, told)
        kernels[scan] = _counted(kernels[scan], calls)
        with ExitStack() as stack:
            for name, kernel in kernels.items():
                stack.enter_context(mock.patch.object(of_megatron, name, kernel))
            is_on_device = mock.patch.object(
                PrefixGroupedLinearAttention, "_runs_torch", lambda *_: False
            )
            stack.enter_context(is_on_device)
            got = test_linear_attention.packed(ours, layout, x, told)
    return _errors(got, want), len(calls)


def mamba(folder: Path) -> tuple[Errors, int]:
    """The scan of ``mamba_ssm``, against transformers' layer in fp64."""
    scan, calls = _mamba_scan(folder), []

    from megatron.core.ssm import mamba_mixer

    from megatron_pg.mcore import PrefixGroupedSeqParams, cpu
    from megatron_pg.mcore.layers import mamba as layer_module
    from tests.mcore import harness, test_mamba

    layout = a_row(140)
    gen = torch.Generator().manual_seed(0)
    with cpu.emulate_cuda():
        harness.initialize(harness.Case())
        mixer = test_mamba.make_mixer(torch.float32, mamba_head_dim=16, mamba_state_dim=16)
        theirs = test_mamba.transformers_mixer(mixer)
        x = torch.randn(layout.total_tokens, 32, generator=gen)
        told = torch.randn(layout.logical_tokens, 32, generator=gen)

        def gradients(module: Any, run: Callable[[Tensor], Tensor], dtype: Any) -> Any:
            leaf = x.to(dtype).requires_grad_()
            out = run(leaf)
            (out * told.to(dtype)).sum().backward()
            found = {n.replace("conv1d_", "conv1d."): p.grad for n, p in module.named_parameters()}
            return {"output": out.detach(), "input": leaf.grad, **found}

        def written_out(leaf: Tensor) -> Tensor:
            samples = layout.expand(leaf).split(layout.sample_lens.tolist())
            return torch.cat([theirs(sample[None])[0] for sample in samples])

        def packed(leaf: Tensor) -> Tensor:
            params = PrefixGroupedSeqParams.from_layout(layout)
            return layout.expand(mixer(leaf[:, None], packed_seq_params=params)[0][:, 0])

        want = gradients(theirs, written_out, torch.float64)
        with (
            mock.patch.object(mamba_mixer, scan.__name__, _counted(scan, calls)),
            mock.patch.object(layer_module, "runs_kernels", lambda x: True),
            mock.patch.object(mamba_mixer, "causal_conv1d_fn", test_mamba._causal_conv1d),
        ):
            got = gradients(mixer, packed, torch.float32)
    return _errors(got, want), len(calls)


def _counted(kernel: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return kernel(*args, **kwargs)

    # The signature is asked for.
    run.__wrapped__ = kernel  # type: ignore[attr-defined]
    return run


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> Errors:
    from tests.linear.rows import relative

    assert got.keys() == want.keys() and all(x.abs().max() > 0 for x in want.values())
    return {name: relative(got[name].double(), x.double()) for name, x in want.items()}


def _mend_fla(folder: Path) -> None:
    """Let the interpreter, in which the number of a loop is Python's, run one of its kernels."""
    sys.path.insert(1, str(folder))
    name = "fla.ops.common.chunk_delta_h"
    source = (folder / name.replace(".", "/")).with_suffix(".py").read_text()
    assert "= i_t.to(tl.int64)" in source
    mended = Path(tempfile.mkdtemp()) / "chunk_delta_h.py"
    mended.write_text(source.replace("= i_t.to(tl.int64)", "= i_t"))
    finder = SimpleNamespace(
        find_spec=lambda asked, *_: spec_from_file_location(name, mended) if asked == name else None
    )
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]


def _mamba_scan(folder: Path) -> Callable[..., Any]:
    """``mamba_chunk_scan_combined``, without the compiled code that its package asks for."""
    package = ModuleType("mamba_ssm")
    package.__path__ = [str(folder / package.__name__)]
    # Gone afterwards, or transformers would call it.
    with mock.patch.dict(sys.modules, {package.__name__: package}):
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    scan: Callable[..., Any] = module.mamba_chunk_scan_combined
    return scan


def _one_config(init: Callable[..., None]) -> Callable[..., None]:
    """Nothing is timed, so the first is as good as any."""
    return lambda self, fn, names, configs, *args, **kwargs: init(
        self, fn, names, configs[:1], *args, **kwargs
    )


def _no_device(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def main(name: str, folder: str) -> None:
    """Print what a comparison found."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    card = SimpleNamespace(multi_processor_count=4)
    with (
        mock.patch.object(Autotuner, "__init__", _one_config(Autotuner.__init__)),
        mock.patch.object(torch.cuda, "device", _no_device),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: card),
    ):
        errors, num_calls = {"gated_delta_net": gated_delta_net, "mamba": mamba}[name](Path(folder))
    dist.destroy_process_group()
    print(json.dumps({"errors": errors, "num_calls": num_calls}))


if __name__ == "__main__":
    main(*sys.argv[1:])
