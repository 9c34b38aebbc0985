"""Gloo ranks that train packed and written out side by side with Megatron's optimizer."""

from __future__ import annotations

import sys
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from megatron_pg.mcore import cpu  # noqa: E402
from tests.mcore import cases, harness  # noqa: E402

STEPS = 20


def train(case: harness.Case, packed: bool, state: list[dict] | None) -> tuple[list, list, list]:
    """Initial weights, final weights and gradient norms of 20 steps."""
    config = harness.make_config(case)
    chunks = harness.build(case, config, packed=packed)
    if state is not None:
        for chunk, weights in zip(chunks, state):
            chunk.load_state_dict(weights)
    initial = [{n: t.clone() for n, t in c.state_dict().items() if t is not None} for c in chunks]
    chunks = harness.wrap_ddp(case, config, chunks)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            # A usual 1e-8 turns the rounding of gradients near zero into full-sized steps.
            adam_eps=1e-3,
            clip_grad=1.0,
            params_dtype=case.dtype,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        chunks,
    )
    config.grad_scale_func = optimizer.scale_loss
    norms = []
    for step in range(STEPS):
        rows = harness.make_dp_rows(case, 2, seed=1000 * step)
        optimizer.zero_grad()
        if packed:
            batches, step_func = harness.packed_microbatches(case, rows), harness.packed_step
        else:
            batches = harness.written_out_microbatches(case, rows)
            step_func = harness.written_out_step
        harness.run_step(case, chunks, step_func, batches)
        success, norm, _ = optimizer.step()
        assert success
        norms.append(norm)
    final = [dict(chunk.module.named_parameters()) for chunk in chunks]
    return initial, final, norms


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.emulate_cuda():
        for name in sys.argv[1:]:
            case = cases.TRAINING[name]
            harness.initialize(case)
            initial, packed, norms = train(case, packed=True, state=None)
            _, stock, control = train(case, packed=False, state=initial)
            assert max(norms) > 1.0, "clipping never acted"
            errors = {}
            for i, (ours, theirs, start) in enumerate(zip(packed, stock, initial)):
                for n, weight in ours.items():
                    moved = (theirs[n] - start[n]).norm()
                    assert moved > 0, f"{n} did not train"
                    errors[f"chunk{i}.{n}"] = ((weight - theirs[n]).norm() / moved).item()
            drift = max(abs(a - b) / b for a, b in zip(norms, control))
            harness.all_ranks_close(errors, case.bound)
            assert drift <= case.bound, f"gradient norms differ by {drift:.2e}"
            if dist.get_rank() == 0:
                worst = max(errors.values())
                print(f"{name}: weights differ by {worst:.1e} of their movement", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
