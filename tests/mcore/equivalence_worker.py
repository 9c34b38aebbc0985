"""Gloo ranks that prove: a packed step equals the written-out step of the stock spec."""

from __future__ import annotations

import sys
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_pg.mcore import count_attention_calls, cpu  # noqa: E402
from tests.mcore import cases, harness  # noqa: E402


def check(name: str, case: harness.Case) -> None:
    harness.initialize(case)
    config = harness.make_config(case)
    stock_config = harness.make_config(case)
    packed = harness.build(case, config, packed=True)
    stock = harness.build(case, stock_config, packed=False)
    for ours, theirs in zip(packed, stock):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    packed = harness.wrap_ddp(case, config, packed)
    stock = harness.wrap_ddp(case, stock_config, stock)
    num_rows = 4 if case.pp == 4 else 2
    rows = harness.make_dp_rows(case, num_rows)
    assert len({row.layout.total_tokens for row in rows}) > 1, "microbatches must differ in length"
    assert all(row.layout.reuse_ratio > 1.3 for row in rows)
    batches = harness.packed_microbatches(case, rows)
    loss = harness.run_step(case, packed, harness.packed_step, batches)
    written_out = harness.written_out_microbatches(case, rows)
    control = harness.run_step(case, stock, harness.written_out_step, written_out)
    if loss is not None:
        assert abs(loss - control) <= case.loss_bound * abs(control), (loss, control)
    got, want = harness.named_gradients(packed), harness.named_gradients(stock)
    errors = {n: ((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-30)).item() for n in want}
    assert all(want[n].norm() > 0 for n in want), "a gradient is zero: nothing is proven"
    harness.all_ranks_close(errors, case.bound)
    calls = [count_attention_calls(chunk) for chunk in packed]
    assert sum(c.prefix_grouped for c in calls) > 0 and sum(c.ordinary for c in calls) == 0
    if dist.get_rank() == 0:
        print(f"{name}: {len(errors)} gradients, worst {max(errors.values()):.1e}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = sys.argv[1:] or list(cases.EQUIVALENCE)
    with cpu.emulate_cuda():
        for name in names:
            case = cases.EQUIVALENCE[name]
            if case.world_size == dist.get_world_size():
                check(name, case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
