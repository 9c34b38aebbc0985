"""What the card reaches at most: ``python -m tools.check_gpu.ceilings OUT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def main(out: Path) -> None:
    """Write OUT/ceilings.json: a large bf16 product and a large copy, each a median of ten."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    product, copy = median_ms(lambda: a @ b), median_ms(lambda: target.copy_(source))
    found = {
        "bf16_product_tflops": 2 * 8192**3 / product / 1e9,
        "copy_gb_per_second": 2 * source.nbytes / copy / 1e6,
        "device_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "launch_us": median_ms(lambda: a[0, :8].add_(0), 1000) * 1e3,
    }
    print(found)
    (out / "ceilings.json").write_text(json.dumps(found))


def median_ms(run: Callable[[], object], calls: int = 3) -> float:
    """Milliseconds of a call by the device's clock, after a warm-up."""
    times: list[float] = []
    for i in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / calls)
    return float(median(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
