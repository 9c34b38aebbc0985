"""What a comparison will hold at once, said before it runs, and whether the machine has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tools.bench.gpt import Dims
from tools.bench.registry import Options

# Of a process with PyTorch and Megatron-Core, before it has a tensor.
_PROCESS_BYTES = 2**29
# A heap that keeps what is freed (``keep_freed_memory``) over what is in use.
_HEAP = 1.75


def has_room(what: str, dims: Dims, tokens: int, options: Options) -> bool:
    """Say what a step on rows of ``tokens`` needs; False, and why, where that is not free.

    Args:
        what: benchmark and shape.
        dims: of the model, and how many ranks of this machine hold it.
        tokens: of the longest path's row; a pipeline has one for each stage.
        options: what device and dtype it runs in.
    """
    needed, free = needed_bytes(dims, tokens, options.dtype), free_bytes(options)
    sizes = {name: getattr(dims, name) for name in ("tp", "pp", "cp")}
    ranks = "".join(f" {name}={size}" for name, size in sizes.items() if size > 1)
    text = f"{what}{ranks}: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    fits = needed <= free
    print(text + ("" if fits else ": left out; --shapes names smaller ones"), file=sys.stderr)
    return fits


def needed_bytes(dims: Dims, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a training step on all ranks: model, gradients, optimizer and activations.

    Counted from what Megatron's local layers save, 12 hidden and 5 MLP sizes a token and layer:
    within 1 % of the measured peaks of fp32 (``memory``). Stage i of a pipeline holds the rows of
    the stages after it, too.
    """
    hidden, ffn, vocab = dims.hidden_size, dims.ffn_hidden_size, dims.vocab_size
    saved = dtype.itemsize * (12 * hidden + 5 * ffn) * dims.num_layers
    activations = tokens * saved * (dims.pp + 1) // 2
    kv = hidden // dims.num_heads * dims.num_query_groups
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * ffn
    parameters = dims.num_layers * layer + 2 * vocab * hidden
    # The parameter and its fp32 copy if it is another, its gradient and Adam's two averages.
    state = parameters * (dtype.itemsize + 12 + 4 * (dtype.itemsize < 4))
    logits = 4 * 4 * dims.chunk_tokens * vocab
    heap, ranks = (_HEAP, dims.num_ranks) if dtype == torch.float32 else (1.1, 0)
    # Context-parallel ranks divide tokens, and hold all weights and a chunk of logits each.
    used = heap * (activations + dims.cp * logits) + dims.cp * state
    return int(used + ranks * _PROCESS_BYTES)


def free_bytes(options: Options) -> int:
    """Memory that is not in use: the GPU's, or the machine's as far as Linux says."""
    if options.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(available) * 1024
