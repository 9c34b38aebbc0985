"""Gloo ranks that exchange torch_dist checkpoints with Megatron-Core at several layouts."""

from __future__ import annotations

import shutil
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from megatron_pg.checkpoint import (  # noqa: E402
    MegatronFolder,
    load_hf,
    make_megatron_args,
    read_hf_config,
)
from megatron_pg.mcore import cpu  # noqa: E402
from tests.checkpoint import tiny  # noqa: E402
from tests.checkpoint.model_worker import same_weights  # noqa: E402
from tests.checkpoint.tiny import Layout  # noqa: E402

LAYOUTS = [Layout(tp=2), Layout(pp=4), Layout(tp=2, pp=2, vpp=2), Layout(tp=4)]
NAMES = ["llama_tied", "llama_bias", "qwen3", "qwen3_moe"]


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
        pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        for (key, a), (other, b) in pairs:
            assert key == other
            if "word_embeddings" in key or "output_layer" in key:
                # What the padding holds is nobody's business.
                used = max(0, vocab_size - ours.pg_collection.tp.rank() * len(a))
                a, b = a[:used], b[:used]
            assert torch.equal(a, b), key


def check(root: Path, name: str, layout: Layout) -> None:
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
    args = make_megatron_args(model, tp_size=layout.tp, pp_size=layout.pp)
    state = sharded(chunks) | {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(saved))
    stock = tiny.build(model, layout, packed=False)
    load(stock, saved)
    assert_same(stock, direct, model.vocab_size)
    if dist.get_rank() == 0:
        count = same_weights(MegatronFolder(saved.parent), source)
        print(f"{name} {layout}: {count} tensors equal", flush=True)
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    for layout in tiny.fresh_groups(LAYOUTS):
        for name in NAMES:
            check(Path(sys.argv[1]), name, layout)


if __name__ == "__main__":
    with cpu.emulate_cuda():
        main()
