"""Four gloo ranks: every layout is laid once and all that is tried on it runs there."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from megatron_pg.mcore import cpu  # noqa: E402
from tests.checkpoint import logits, megatron_exchange, round_trip, tiny  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, Layout  # noqa: E402

DENSE = [name for name, family in FAMILIES.items() if family.name != "Qwen3Moe"]
EXPERTS = [name for name, family in FAMILIES.items() if family.name == "Qwen3Moe"]
EXCHANGED = ["llama_tied", "llama_bias", "qwen3", "qwen3_moe"]

# layout -> models for: round trip, logits, exchange with Megatron-Core
LAYOUTS = {
    Layout(): (DENSE + EXPERTS, [], []),
    Layout(tp=2, sp=True): (DENSE + EXPERTS, DENSE + EXPERTS, []),
    Layout(tp=4, sp=True): (DENSE, DENSE, EXCHANGED),
    Layout(pp=2): (DENSE, DENSE + EXPERTS, []),
    Layout(pp=2, vpp=2): (DENSE + EXPERTS, [], []),
    Layout(pp=4): (DENSE, [], ["llama_tied"]),
    Layout(pp=4, vpp=2): (DENSE, [], []),
    Layout(tp=2, pp=2, sp=True): (DENSE + EXPERTS, DENSE, []),
    Layout(tp=2, pp=2, vpp=2): (DENSE, [], EXCHANGED),
    Layout(ep=4): (EXPERTS, [], []),
    Layout(tp=2, ep=2, sp=True): (EXPERTS, [], []),
    Layout(pp=2, ep=2): (EXPERTS, [], []),
}


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for layout in tiny.fresh_groups(LAYOUTS):
        for run, names in zip((round_trip, logits, megatron_exchange), LAYOUTS[layout]):
            for name in names:
                run.check(root, name, layout)


if __name__ == "__main__":
    with cpu.emulate_cuda():
        main()
