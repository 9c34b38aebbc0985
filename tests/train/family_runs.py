"""The recipe on a tiny model of a family, and the same run as a plain loop over transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from megatron_pg.data import Group, read_rollouts
from megatron_pg.train import TrainConfig, load_config
from tests.checkpoint.tiny import FAMILIES, save_hf
from tests.train import dense, tiny
from tests.train.runs import Weights

VOCAB = 83
NUM_STEPS = 5
# Narrow enough to clip second minibatches.
LOSS = dense.LossCase(low=0.01, high=0.02, kl=0.1)
LAYOUTS = ("tp2_sp", "pp2")
# What no optimizer has, no token came to, or is a logarithm, of which little is much.
_MAY_STAY = ("e_score_correction_bias", ".experts.", ".A_log")


def prepare(folder: Path, name: str, **overrides: object) -> TrainConfig:
    """Five steps of four groups in two minibatches, from the folder of a random model.

    Some have experts in not all of their layers; each of two stages has a layer with them.
    """
    family = FAMILIES[name]
    is_mixed = family.has_experts or family.is_hybrid
    save_hf(family, folder / "model", num_layers=4 if is_mixed else 2)
    groups = [g for g in tiny.make_groups(6, seed=3) if len(g.samples) == 4]
    sections = tiny.run_sections(folder, groups)
    sections["rollout"]["shuffle"] = False
    sections["algorithm"] = {"num_minibatches": 2} | LOSS.algorithm()
    sections["run"] |= {"groups_per_step": 4, "num_steps": NUM_STEPS, "self_check_interval": None}
    sections["prefix_group"]["max_tokens_per_microbatch"] = 70
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def plain_run(config: TrainConfig, out: Path) -> None:
    """The run of ``config`` by transformers, every sample alone, and torch's Adam."""
    groups = read_rollouts(config.rollout.files, vocab_size=VOCAB)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(
            config.model.hf, attn_implementation="eager", dtype=torch.float32
        )
        for _ in range(2)
    )

    def logits_of(model: torch.nn.Module) -> dense.LogitsOf:
        return lambda tokens: model(tokens[None], use_cache=False).logits[0]

    def with_logprobs(batch: list[Group]) -> list[Group]:
        with torch.no_grad():
            calls = map(logits_of, (policy, reference))
            passes = [dense.sample_logprobs(call, batch, VOCAB) for call in calls]
        numbers = iter(zip(*passes, strict=True))
        return [
            replace(
                group,
                samples=tuple(
                    replace(sample, old_logprobs=old.double(), ref_logprobs=ref.double())
                    for sample, (old, ref) in zip(group.samples, numbers)
                ),
            )
            for group in batch
        ]

    adam = torch.optim.AdamW(
        policy.parameters(),
        lr=config.optimizer.lr,
        eps=config.optimizer.adam_eps,
        weight_decay=0.0,
    )
    per_step, count = config.run.groups_per_step, config.algorithm.num_minibatches
    for step in range(config.run.num_steps):
        places = [(step * per_step + i) % len(groups) for i in range(per_step)]
        chosen = with_logprobs([groups[i] for i in places])
        for first in range(0, per_step, per_step // count):
            adam.zero_grad()
            part = chosen[first : first + per_step // count]
            dense.dense_loss(logits_of(policy), part, LOSS, VOCAB).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            adam.step()
    policy.save_pretrained(out)


def largest_difference(ours: Weights, plain: Weights, start: Weights) -> float:
    """The largest difference of a tensor, as a part of how far the plain loop has moved it.

    What the loop has not moved must have kept its bits; an expert that few tokens came to may have
    moved less than rounding allows to compare.
    """
    assert ours.keys() == plain.keys() == start.keys()
    largest, num_moved = 0.0, 0
    for name, want in plain.items():
        moved, least = float((want - start[name]).norm()), 1e-3 * float(start[name].norm())
        if any(part in name for part in _MAY_STAY):
            if moved == 0:
                assert torch.equal(ours[name], start[name]), name
                continue
        else:
            assert moved > least, f"{name} did not train"
        num_moved += moved > least
        largest = max(largest, float((ours[name] - want).norm()) / max(moved, least))
    assert num_moved > 0.8 * len(plain)
    return largest
