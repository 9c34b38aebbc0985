"""Two gloo ranks that train, reshard between steps, and end where an unbroken run ends."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from megatron_pg.checkpoint import (  # noqa: E402
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    compare_training_state,
    compare_weights,
    export_hf,
    load_hf,
    make_megatron_args,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.mcore import cpu  # noqa: E402
from tests.checkpoint import tiny  # noqa: E402
from tests.checkpoint.megatron_exchange import sharded  # noqa: E402
from tests.checkpoint.tiny import Layout  # noqa: E402
from tests.mcore import harness  # noqa: E402
from tests.utils import assert_close  # noqa: E402

NAME = "qwen2"
STEPS = 2
LEGS = [Layout(tp=2, sp=True), Layout(pp=2), Layout()]
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class Run:
    """Chunks, their optimizer, and the batches of a layout."""

    def __init__(
        self, source: Path, layout: Layout, distributed: bool = False, packed: bool = True
    ) -> None:
        self.model, self.layout, self.packed = read_hf_config(source), layout, packed
        self.chunks = tiny.build(self.model, layout, packed=packed)
        self.case = harness.Case(
            tp=layout.tp,
            pp=layout.pp,
            sp=layout.sp,
            dtype=torch.float32,
            distributed_optimizer=distributed,
        )
        load_hf(self.chunks, source)
        self.wrapped = harness.wrap_ddp(self.case, self.chunks[0].config, self.chunks)
        config = OptimizerConfig(
            optimizer="adam",
            lr=3e-2,
            # Rounding of a vanishing gradient must not decide the sign of an update.
            adam_eps=1e-2,
            use_distributed_optimizer=distributed,
            clip_grad=1.0,
        )
        self.optimizer = get_megatron_optimizer(config, self.wrapped)

    def train(self, first_step: int) -> None:
        for step in range(first_step, first_step + STEPS):
            pad = self.layout.tp if self.layout.sp else 1
            rows = [harness.make_rows(100 * step + i, pad) for i in range(2)]
            size = parallel_state.get_data_parallel_world_size()
            own = rows[parallel_state.get_data_parallel_rank() :: size]
            self.optimizer.zero_grad()
            if self.packed:
                step_func, make = harness.packed_step, harness.packed_microbatches
            else:
                step_func, make = harness.written_out_step, harness.written_out_microbatches
            harness.run_step(self.case, self.wrapped, step_func, make(self.case, own))
            assert self.optimizer.step()[0]

    def state(self, loading: bool) -> dict[str, Any]:
        state = sharded(self.chunks)
        options = dict(is_loading=loading, metadata=FORMAT)
        return state | {"optimizer": self.optimizer.sharded_state_dict(state["model"], **options)}

    def save(self, folder: Path, step: int) -> None:
        args = make_megatron_args(self.model, tp_size=self.layout.tp, pp_size=self.layout.pp)
        target = folder / f"iter_{step:07d}"
        if dist.get_rank() == 0:
            target.mkdir(parents=True)
            (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        dist.barrier()
        state = self.state(loading=False) | {"args": args, "iteration": step}
        dist_checkpointing.save(state, str(target))

    def load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self.state(loading=True), str(folder))
        self.chunks[0].load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main() -> None:
    torch.set_num_threads(1)
    source, out = Path(sys.argv[1]) / NAME, Path(sys.argv[2])
    for leg, layout in enumerate(tiny.fresh_groups(LEGS)):
        run_leg(source, out, layout, leg)


def run_leg(source: Path, out: Path, layout: Layout, leg: int) -> None:
    here = out / str(leg)
    if leg == 0:
        distributed_optimizer(source, out / "distributed", layout)
        unbroken = Run(source, layout)
        for i in range(len(LEGS)):
            unbroken.train(i * STEPS)
        export_hf(unbroken.chunks, out / "unbroken", source)
    # The middle leg runs the stock spec: each spec goes on from what the other saved.
    run = Run(source, layout, packed=leg != 1)
    if leg:
        before, resharded = out / str(leg - 1), here / "resharded"
        if dist.get_rank() == 0:
            reshard_checkpoint(before, resharded, tp_size=layout.tp, pp_size=layout.pp)
        dist.barrier()
        run.load(resharded / f"iter_{leg * STEPS:07d}")
    run.train(leg * STEPS)
    run.save(here, (leg + 1) * STEPS)
    if leg == len(LEGS) - 1:
        export_hf(run.chunks, out / "resharded", source)
        compare(out, source)


def distributed_optimizer(source: Path, out: Path, layout: Layout) -> None:
    """Its fully reshardable state goes along (loading it needs Apex or Transformer Engine)."""
    run = Run(source, layout, distributed=True)
    run.train(0)
    run.save(out / "saved", STEPS)
    if dist.get_rank() == 0:
        reshard_checkpoint(out / "saved", out / "resharded", tp_size=1, pp_size=2)
        saved, resharded = MegatronFolder(out / "saved"), MegatronFolder(out / "resharded")
        moments = [k for k in TorchDistReader(resharded.path).tensors if "exp_avg_sq" in k]
        assert len(moments) > 5
        assert not list(compare_training_state(saved, resharded))
        assert not list(compare_weights(saved, resharded))
        print("same distributed state", flush=True)
    dist.barrier()


def compare(out: Path, source: Path) -> None:
    folders = (out / "resharded", out / "unbroken", source)
    got, want, start = (HfFolder(path) for path in folders)
    moved = 0.0
    for name in want.shapes:
        assert_close(name, got.read(name), want.read(name), 1e-5)
        moved = max(moved, (want.read(name) - start.read(name)).abs().max().item())
    assert moved > 1e-2, "nothing was trained"
    if dist.get_rank() == 0:
        print("same trajectory", flush=True)


if __name__ == "__main__":
    with cpu.emulate_cuda():
        main()
