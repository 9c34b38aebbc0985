"""On one of two ranks: legs of a training that is resharded between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_pg.checkpoint import (
    export_hf,
    load_hf,
    make_megatron_args,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.parallel import ParallelSizes
from tests.checkpoint import tiny
from tests.checkpoint.megatron_exchange import sharded
from tests.checkpoint.tiny import Layout
from tests.mcore import harness

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
        args = make_megatron_args(self.model, ParallelSizes(tp=self.layout.tp, pp=self.layout.pp))
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


def run_leg(source: Path, out: Path, leg: int) -> None:
    """Two steps from where the leg before ended; the first leg makes the unbroken run too."""
    layout, here = LEGS[leg], out / str(leg)
    with tiny.on_layout(layout):
        if leg == 0:
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


def save_distributed(source: Path, out: Path) -> None:
    """Two steps with the distributed optimizer."""
    with tiny.on_layout(LEGS[0]):
        run = Run(source, LEGS[0], distributed=True)
        run.train(0)
        run.save(out, STEPS)
