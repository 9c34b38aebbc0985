"""One step of a loop of one's own on the ranks of a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_pg.grpo import GrpoConfig, GrpoStep, PrefixGroupConfig, total_over_replicas
from tests.mcore import harness
from tests.train import late_imports  # noqa: F401

SETTINGS = PrefixGroupConfig(max_tokens_per_microbatch=48)


def make_chunks(case: harness.Case) -> list[Any]:
    config = harness.make_config(case)
    return harness.wrap_ddp(case, config, harness.build(case, config, packed=True))


def whole_step(
    case: harness.Case, algorithm: GrpoConfig, settings: PrefixGroupConfig, parts: Sequence[Any]
) -> dict[str, Any]:
    """Gradients and losses of every minibatch; replica i brings ``parts[i]``."""
    with harness.on_cpu():
        harness.initialize(case)
        step = GrpoStep(
            make_chunks(case), vocab_size=harness.VOCAB, algorithm=algorithm, settings=settings
        )
        # What the other ranks of a replica pass is not looked at.
        groups = parts[step.ranks.dp_rank] if step.ranks.leads_replica else "nothing"
        check = step.self_check(groups, 100)
        batch = step.prepare(groups)
        gradients: dict[str, torch.Tensor] = {}
        losses = []
        for minibatch in range(len(batch.minibatches)):
            sums = step.backward(batch, minibatch)
            losses.append(total_over_replicas(sums, step.ranks).get("loss"))
            for name, gradient in harness.named_gradients(step.chunks).items():
                gradients[f"{minibatch}.{name}"] = gradient
        return {
            "place": (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
            ),
            "gradients": gradients,
            "losses": losses,
            "kl": batch.kl_of_samples,
            "check": check,
            "num_tokens": batch.num_tokens,
        }


def refused(case: harness.Case, parts: Sequence[Any]) -> str:
    """The ValueError that this rank gets."""
    with harness.on_cpu():
        harness.initialize(case)
        step = GrpoStep(make_chunks(case), vocab_size=harness.VOCAB, settings=SETTINGS)
        try:
            step.prepare(parts[step.ranks.dp_rank] if step.ranks.leads_replica else "nothing")
        except ValueError as error:
            return str(error)
        return "nothing"
