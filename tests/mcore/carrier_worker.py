"""Gloo ranks of an interleaved schedule whose layers write down what they are handed."""

from __future__ import annotations

import sys
import warnings

warnings.filterwarnings("ignore")

from unittest import mock  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_pg.attention import interface  # noqa: E402
from megatron_pg.mcore import cpu  # noqa: E402
from tests.mcore import cases, harness, probes  # noqa: E402

CASES = {
    "pp2_vpp2_full": harness.Case(pp=2, vpp=2, num_layers=4, config=cases.FULL_RECOMPUTE),
    "pp2_vpp2_router_selective": harness.Case(
        pp=2,
        vpp=2,
        num_layers=4,
        **cases.moe(recompute_granularity="selective", recompute_modules=["moe"]),
    ),
}


def check(name: str, case: harness.Case) -> None:
    harness.initialize(case)
    config = harness.make_config(case)
    records: probes.Records = []
    with probes.probed_layers(records):
        policy, reference = (
            harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
            for _ in range(2)
        )
    rows = harness.make_dp_rows(case, 4)
    counted = mock.Mock(side_effect=interface.make_attention_plan)
    with mock.patch.object(interface, "make_attention_plan", counted):
        # Each call makes its rows' parameters anew, as a pass over them does.
        for chunks in (reference, policy, policy):
            records.clear()
            batches = harness.packed_microbatches(case, rows)
            harness.run_step(case, chunks, harness.packed_step, batches)
            # Two layers of this rank, each run and recomputed.
            probes.check_records(records, rows, 2 * 2)
    planned = [call.args[0] for call in counted.call_args_list]
    assert len(planned) == len(rows) and {*planned} == {row.layout for row in rows}, len(planned)
    print(f"{name}: every call got its own row's mask, {len(planned)} plans", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.emulate_cuda():
        for name in sys.argv[1:]:
            check(name, CASES[name])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
