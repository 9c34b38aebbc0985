"""GRPO written out: every sample alone, dense padded arrays, no code of the package's losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_pg.data import Group

LogitsOf = Callable[[Tensor], Tensor]
"""Tokens ``[L]`` of one written-out sample to logits ``[L, vocabulary]``."""


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """One loss, and the settings under which the recipe has it."""

    aggregation: str = "token-mean"
    low: float = 0.2
    high: float = 0.28
    dual: float | None = None
    kl: float = 0.0
    entropy: float = 0.0
    truncate: float | None = None
    constant: float | None = None

    def algorithm(self) -> dict[str, object]:
        """As the ``algorithm`` section of a configuration."""
        policy: dict[str, object] = {
            "clip_ratio_low": self.low,
            "clip_ratio_high": self.high,
            "clip_ratio_c": self.dual,
            "kl_loss_coef": self.kl,
            "entropy_coeff": self.entropy,
        }
        if self.truncate is not None:
            policy |= {"importance_mode": "token_truncate", "importance_high": self.truncate}
        return {
            "policy": policy,
            "loss_agg_mode": self.aggregation,
            "loss_scale_factor": self.constant,
        }


LOSSES = {
    "token_mean": LossCase(dual=1.5, kl=0.05, entropy=0.01),
    "sequence_mean": LossCase(aggregation="seq-mean-token-mean", low=0.1, kl=0.2, truncate=1.1),
    "constant": LossCase(aggregation="seq-mean-token-sum-norm", constant=10.0, entropy=0.02),
}


def advantages_of(groups: Sequence[Group]) -> Tensor:
    """``[N]``: reward less the mean over the standard deviation; a lone reward is itself."""
    values = []
    for group in groups:
        rewards = [sample.reward for sample in group.samples]
        n = len(rewards)
        mean = sum(rewards) / n if n > 1 else 0.0
        variance = sum((r - mean) ** 2 for r in rewards) / (n - 1) if n > 1 else 1.0
        if n > 1 and max(rewards) == min(rewards):
            values += [0.0] * n
        else:
            values += [(r - mean) / (variance**0.5 + 1e-6) for r in rewards]
    return torch.tensor(values, dtype=torch.float64)


def sample_logprobs(logits_of: LogitsOf, groups: Sequence[Group], vocab: int) -> list[Tensor]:
    """Logprobs ``[R]`` of every sample's response, sample after sample."""
    found = []
    for group in groups:
        for sample in group.samples:
            logits = logits_of(sample.tokens)[:, :vocab].log_softmax(-1)
            rows = logits[len(sample.prompt_ids) - 1 : -1]
            found.append(rows.gather(1, sample.response_ids[:, None])[:, 0])
    return found


def dense_loss(logits_of: LogitsOf, groups: Sequence[Group], case: LossCase, vocab: int) -> Tensor:
    """The loss of one optimizer step over written-out samples in padded arrays."""
    samples = [sample for group in groups for sample in group.samples]
    width = max(len(s.response_ids) for s in samples)

    def padded(values: Sequence[Tensor | None]) -> Tensor:
        rows = []
        for sample, v in zip(samples, values):
            v = torch.zeros(len(sample.response_ids)) if v is None else v.double()
            rows.append(torch.cat([v, v.new_zeros(width - len(v))]))
        return torch.stack(rows)

    logprobs, entropies = [], []
    for sample in samples:
        rows = logits_of(sample.tokens)[:, :vocab].log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        logprobs.append(rows.gather(1, sample.response_ids[:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1))
    new, entropy = padded(logprobs), padded(entropies)
    old = padded([s.old_logprobs for s in samples])
    mask = padded([s.loss_mask for s in samples])
    advantage = advantages_of(groups)[:, None]
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - case.low, 1 + case.high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if case.dual is not None:
        bounded = torch.minimum(loss, -case.dual * advantage)
        loss = torch.where(advantage < 0, bounded, loss)
    if case.truncate is not None:
        behaviour = padded([s.rollout_logprobs for s in samples])
        loss = loss * torch.clamp(torch.exp(old - behaviour), max=case.truncate)
    if case.kl:
        delta = padded([s.ref_logprobs for s in samples]) - new
        # As documented: no single token counts for more than 10.
        loss = loss + case.kl * (torch.exp(delta) - delta - 1).clamp(max=10)
    loss = (loss - case.entropy * entropy) * mask
    per_sample = loss.sum(1)
    if case.aggregation == "token-mean":
        return per_sample.sum() / mask.sum()
    if case.aggregation == "seq-mean-token-mean":
        return (per_sample / mask.sum(1)).mean()
    assert case.constant is not None
    return per_sample.mean() / case.constant
