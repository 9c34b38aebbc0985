"""Gloo ranks that load Hugging Face folders, export them and compare with the originals."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_pg.checkpoint import (  # noqa: E402
    HfFolder,
    WeightSource,
    export_hf,
    load_hf,
    read_hf_config,
)
from megatron_pg.mcore import cpu  # noqa: E402
from tests.checkpoint import tiny  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, Layout  # noqa: E402

DENSE_LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(pp=2, vpp=2),
    Layout(pp=4),
    Layout(pp=4, vpp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, vpp=2),
]
EXPERT_LAYOUTS = [Layout(ep=4), Layout(tp=2, ep=2, sp=True), Layout(pp=2, ep=2)]


def same_weights(got: WeightSource, want: Path) -> int:
    source = HfFolder(want)
    assert got.shapes == source.shapes and got.dtypes == source.dtypes
    for name in source.shapes:
        assert torch.equal(got.read(name), source.read(name)), f"{got.path}: {name}"
    return len(source.shapes)


def round_trip(root: Path, name: str, layout: Layout) -> None:
    source = root / name
    model = read_hf_config(source)
    chunks = tiny.build(model, layout)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_hf(chunks, source)
    for chunk in chunks:
        for key, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), key
    out = root / f"{name}-out"
    small = 30_000 if FAMILIES[name].max_shard_size != "5GB" else 10**9
    export_hf(chunks, out, source, max_shard_bytes=small)
    if dist.get_rank() == 0:
        count = same_weights(HfFolder(out), source)
        assert read_hf_config(out) == model
        files = len(list(out.glob("*.safetensors")))
        print(f"{name} {layout}: {count} tensors in {files} files equal", flush=True)
        shutil.rmtree(out)
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    start = time.perf_counter()
    for layout in tiny.fresh_groups((*DENSE_LAYOUTS, *EXPERT_LAYOUTS)):
        for name, family in FAMILIES.items():
            if layout in DENSE_LAYOUTS or family.name == "Qwen3Moe":
                round_trip(root, name, layout)
    print(f"{time.perf_counter() - start:.1f} seconds")


if __name__ == "__main__":
    with cpu.emulate_cuda():
        main()
