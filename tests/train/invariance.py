"""On one rank: the recipe's loss and gradients, and those of the written-out reference.

The reference is made with the stock model and the stock spec on written-out samples.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_pg.checkpoint import iter_hf_tensors, load_hf, read_hf_config
from megatron_pg.data import Group, read_rollouts
from megatron_pg.grpo import GrpoStep, PrefixGroupConfig, Ranks, StepBatch
from megatron_pg.grpo.placement import written_out
from megatron_pg.train import TrainConfig, load_config, parallel_run
from megatron_pg.train.model import build_trained_model
from megatron_pg.train.model.plan import plan_model
from tests.checkpoint import tiny as stock
from tests.train import dense, late_imports, layouts  # noqa: F401
from tests.train.tiny import VOCAB


@dataclass(frozen=True)
class Variant:
    """One way to lay the same groups into rows."""

    max_tokens: int = 64
    order: int | None = None
    is_written_out: bool = False
    min_shared: int | None = None
    residency: Literal["never", "retain", "recompute"] = "never"
    max_resident_tokens: int = 64

    @property
    def has_waves(self) -> bool:
        """Whether the prefixes are not all resident at once."""
        return self.residency != "never" and self.max_resident_tokens < 64


# "whole": every group fits into a row; "split": groups are divided over rows.
VARIANTS = {
    "whole": Variant(),
    "split": Variant(max_tokens=21),
    "one_row": Variant(max_tokens=1000),
    "reordered": Variant(order=1),
    "reordered_split": Variant(max_tokens=25, order=2),
    "written_out": Variant(is_written_out=True),
    "detected": Variant(min_shared=1),
}
RESIDENT_VARIANTS = {
    "retained": Variant(max_tokens=18, residency="retain"),
    "recomputed": Variant(max_tokens=18, residency="recompute"),
    "waves": Variant(max_tokens=18, order=3, residency="retain", max_resident_tokens=14),
    "waves_recomputed": Variant(
        max_tokens=18, order=4, residency="recompute", max_resident_tokens=14
    ),
    "detected": Variant(max_tokens=18, min_shared=1, residency="retain"),
}
SUITES = {"packing": VARIANTS, "resident": RESIDENT_VARIANTS}


def variant_names(suite: str, layout: str) -> tuple[str, ...]:
    """All where one rank runs them, fewer where ranks wait for each other."""
    if layout == "one":
        return tuple(SUITES[suite])
    if suite == "resident":
        return ("waves", "waves_recomputed")
    # Two in a row, with different numbers of microbatches.
    two = ("pp2", "dp2", "dp2_overlap")
    return ("whole", "reordered_split") if layout in two else ("reordered_split",)


def hf_tensors(chunks: list[Any], folder: Path, of: str) -> dict[str, torch.Tensor]:
    """The model's weights or gradients by their Hugging Face names, whole, on every rank."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    for parameter in parameters if of != "data" else []:
        parameter.data = getattr(parameter, of).detach()
    own = {n: t.clone() for n, t in iter_hf_tensors(chunks, read_hf_config(folder))}
    for parameter, weight in zip(parameters, weights):
        parameter.data = weight
    return {name: t for part in layouts.gather(own) for name, t in part.items()}


def write_reference(folder: Path) -> None:
    """Loss and gradients of every loss, from the stock model on written-out samples."""
    config = load_config(folder / "config.yaml")
    groups = read_rollouts(folder / "rollouts.jsonl", vocab_size=VOCAB)
    with parallel_run(config.parallel, config.run.seed):
        reference = {name: stock_step(folder, groups, case) for name, case in dense.LOSSES.items()}
        torch.save(reference, folder / "reference.pt")


def stock_step(
    folder: Path, groups: list[Group], case: dense.LossCase
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name."""
    (chunk,) = stock.build(
        read_hf_config(folder / "model"), stock.Layout(), torch.float64, packed=False
    )
    load_hf([chunk], folder / "model")

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        n = len(tokens)
        mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
        return chunk(tokens[None], torch.arange(n)[None], mask)[0]

    loss = dense.dense_loss(logits_of, groups, case, VOCAB)
    loss.backward()
    gradients = hf_tensors([chunk], folder / "model", "grad")
    assert min(g.abs().max() for g in gradients.values()) > 1e-6, "a gradient vanishes"
    return float(loss), gradients


class Subject:
    """The recipe's model and passes on one layout."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.plan = plan_model(config.model, config.parallel)
        self.model = build_trained_model(config, self.plan, 1)

    def step(self, variant: Variant, config: TrainConfig) -> GrpoStep:
        resident = variant.residency != "never"
        return GrpoStep(
            self.model.chunks,
            vocab_size=VOCAB,
            algorithm=config.algorithm,
            settings=PrefixGroupConfig(
                max_tokens_per_microbatch=variant.max_tokens,
                min_shared=variant.min_shared,
                prefix_resident="always" if resident else "never",
                prefix_resident_mode=variant.residency if resident else "retain",
                max_resident_tokens=variant.max_resident_tokens,
                logprob_chunk_tokens=7,
            ),
            max_response_tokens=config.rollout.max_response_tokens,
        )

    def batch(self, step: GrpoStep, groups: list[Group], variant: Variant) -> StepBatch:
        """Written out, the samples have the advantages that they have in their groups."""
        whole = step.prepare(layouts.own_groups(groups, self.ranks))
        if not variant.is_written_out:
            return whole
        alone = step.pack(written_out(step.place(layouts.own_groups(groups, self.ranks))))
        return replace(alone, values=whole.values)

    def loss_and_gradients(self, step: GrpoStep, batch: StepBatch) -> tuple[float, dict[str, Any]]:
        sums = step.backward(batch)
        own = sums["loss"] if self.ranks.speaks_for_replica else 0.0
        bare = [chunk.module for chunk in self.model.chunks]
        gradients = hf_tensors(bare, Path(str(self.config.model.hf)), "main_grad")
        return sum(layouts.gather(own)), gradients

    def first_ratio_is_one(self, groups: list[Group], variant: Variant) -> int:
        """Old logprobs by the same packing equal the trained ones bit for bit; tokens compared."""
        plain = [
            replace(g, samples=tuple(replace(s, old_logprobs=None) for s in g.samples))
            for g in groups
        ]
        step = self.step(variant, self.config)
        batch = self.batch(step, plain, variant)
        old = step.logprobs(batch)
        assert torch.equal(old, step.logprobs(batch))
        sums = step.backward(replace(batch, values=replace(batch.values, old_logprobs=old)))
        if not self.ranks.is_last_stage:
            return 0
        # A sum of ones is exact, and any other ratio would show in the sum of |log ratio| too.
        assert sums["ratio"] == sums["num_tokens"] == len(old)
        assert sums["ppo_kl"] == 0 and sums["clipfrac_low"] == sums["clipfrac_high"] == 0
        return int(sums["num_tokens"])


@dataclass(frozen=True)
class Compared:
    """One loss on one rank; errors are relative to the reference's.

    Attributes:
        rows, resident_groups, waves: of this rank.
        first_tokens: of all ranks, whose first ratio was exactly one.
    """

    loss_error: float
    errors: dict[str, float]
    rows: int
    resident_groups: int
    waves: int
    first_tokens: int


def compare(folder: Path, layout: str, variant: Variant) -> dict[str, Compared]:
    """Every loss of one way to lay the groups of ``folder`` into rows, on one layout."""
    config = layouts.with_layout(load_config(folder / "config.yaml"), layout)
    groups = read_rollouts(folder / "rollouts.jsonl", vocab_size=VOCAB)
    if variant.order is not None:
        random.Random(variant.order).shuffle(groups)
    reference = torch.load(folder / "reference.pt")
    found = {}
    with parallel_run(config.parallel, config.run.seed) as ranks:
        subject = Subject(config, ranks)
        tokens = sum(layouts.gather(subject.first_ratio_is_one(groups, variant)))
        for name, (loss, gradients) in reference.items():
            case = load_config(folder / f"{name}.yaml")
            step = subject.step(variant, case)
            batch = subject.batch(step, groups, variant)
            got, ours = subject.loss_and_gradients(step, batch)
            assert ours.keys() == gradients.keys()
            found[name] = Compared(
                loss_error=abs(got - loss) / abs(loss),
                errors={
                    n: float((ours[n] - want).abs().max() / want.abs().max())
                    for n, want in gradients.items()
                },
                rows=len(batch.minibatches[0].rows),
                resident_groups=batch.tokens.resident_groups,
                waves=batch.tokens.waves,
                first_tokens=tokens,
            )
    return found
