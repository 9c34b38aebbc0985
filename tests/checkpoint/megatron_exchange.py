"""Exchange torch_dist checkpoints with Megatron-Core, in both directions."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_pg.checkpoint import (
    MegatronFolder,
    load_hf,
    make_megatron_args,
    read_hf_config,
)
from megatron_pg.checkpoint.load import named_weights
from megatron_pg.parallel import ParallelSizes
from tests.checkpoint import tiny
from tests.checkpoint.round_trip import same_weights
from tests.checkpoint.tiny import Layout


def sharded(chunks: list[Any]) -> dict[str, Any]:
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def load(chunks: list[Any], folder: Path) -> dict[str, Any]:
    state = dist_checkpointing.load(sharded(chunks), str(folder))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"])
    return state


def assert_same(got: list[Any], want: list[Any], vocab_size: int) -> None:
    for ours, theirs in zip(got, want, strict=True):
        pairs = zip(named_weights(ours), named_weights(theirs), strict=True)
        for (key, a), (other, b) in pairs:
            assert key == other
            if "word_embeddings" in key or "output_layer" in key:
                # What the padding holds is nobody's business.
                used = max(0, vocab_size - ours.pg_collection.tp.rank() * len(a))
                a, b = a[:used], b[:used]
            assert torch.equal(a, b), key


class Trusted:
    """What a legacy checkpoint may hold besides tensors; reading it takes trust."""


def save_legacy(root: Path, chunks: list[Any], args: Namespace, layout: Layout) -> Path:
    """As Megatron-LM's --ckpt-format torch."""
    if dist.get_rank() == 0:
        shutil.rmtree(root, ignore_errors=True)
    dist.barrier()
    groups = chunks[0].pg_collection
    rank = f"mp_rank_{groups.tp.rank():02d}"
    if layout.pp > 1:
        rank += f"_{groups.pp.rank():03d}"
    folder = root / "iter_0000007" / rank
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "rng_state": [Trusted()]}
    for i, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{i}"
        state[key] = chunk.state_dict_for_save_checkpoint()
    if parallel_state.get_data_parallel_rank() == 0:
        folder.mkdir(parents=True)
        torch.save(state, folder / "model_optim_rng.pt")
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    return root


def check(root: Path, name: str, layout: Layout) -> int:
    """Equal tensors of the saved checkpoint, on the first rank; this runs on every rank."""
    source, converted = root / name, root / f"{name}-megatron" / "release"
    model = read_hf_config(source)
    # Prefix-grouped reads what the converter wrote, the stock spec reads what that saves.
    chunks = tiny.build(model, layout)
    args = load(chunks, converted)["args"]
    assert isinstance(args, Namespace) and args.num_layers == model.num_layers
    direct = tiny.build(model, layout)
    load_hf(direct, source)
    assert_same(chunks, direct, model.vocab_size)
    saved = root / f"{name}-saved" / "iter_0000007"
    if dist.get_rank() == 0:
        shutil.rmtree(saved.parent, ignore_errors=True)
        saved.mkdir(parents=True)
        (saved.parent / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    sizes = ParallelSizes(tp=layout.tp, pp=layout.pp, vpp=layout.vpp)
    args = make_megatron_args(model, sizes, layout.split)
    state = sharded(chunks) | {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(saved))
    stock = tiny.build(model, layout, packed=False)
    load(stock, saved)
    assert_same(stock, direct, model.vocab_size)
    legacy = save_legacy(root / f"{name}-legacy", chunks, args, layout)
    count = 0
    if dist.get_rank() == 0:
        count = same_weights(MegatronFolder(saved.parent), source)
        if model.num_experts is None:
            with pytest.raises(ValueError, match="trust_pickle=True"):
                MegatronFolder(legacy)
            same_weights(MegatronFolder(legacy, trust_pickle=True), source)
    dist.barrier()
    return count
