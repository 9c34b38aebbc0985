"""Load a Hugging Face folder, export it, and compare with the original."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_pg.checkpoint import (
    HfFolder,
    WeightSource,
    export_hf,
    load_hf,
    read_hf_config,
)
from megatron_pg.checkpoint.load import named_weights
from tests.checkpoint import tiny
from tests.checkpoint.tiny import FAMILIES, Layout


def same_weights(got: WeightSource, want: Path) -> int:
    source = HfFolder(want)
    assert got.shapes == source.shapes and got.dtypes == source.dtypes
    for name in source.shapes:
        assert torch.equal(got.read(name), source.read(name)), f"{got.path}: {name}"
    return len(source.shapes)


def check(root: Path, name: str, layout: Layout) -> int:
    """Equal tensors, on the first rank; this runs on every rank."""
    source = root / name
    model = read_hf_config(source)
    chunks = tiny.build(model, layout)
    with torch.no_grad():
        for chunk in chunks:
            for _, weight in named_weights(chunk):
                weight.fill_(float("nan"))
    load_hf(chunks, source)
    for chunk in chunks:
        for key, weight in named_weights(chunk):
            assert not weight.isnan().any(), key
    out = root / f"{name}-out"
    small = 30_000 if FAMILIES[name].max_shard_size != "5GB" else 10**9
    export_hf(chunks, out, source, max_shard_bytes=small)
    if dist.get_rank():
        return 0
    count = same_weights(HfFolder(out), source)
    assert read_hf_config(out) == model
    shutil.rmtree(out)
    return count
