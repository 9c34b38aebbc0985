"""Whole runs on ranks of their own, what they leave behind, and the same run written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import load_file

from megatron_pg.checkpoint import export_hf, load_hf, read_hf_config
from megatron_pg.data import Group, read_rollouts
from megatron_pg.train import TrainConfig, parallel_run
from tests.checkpoint import tiny as stock
from tests.ranks import Pool
from tests.train import dense, late_imports, tiny  # noqa: F401
from tests.train.layouts import NUM_RANKS, with_layout
from tests.train.tiny import VOCAB

TIMEOUT_MINUTES = 3.0
Weights = dict[str, torch.Tensor]
Ended = tuple[Weights, list[dict[str, float]]]


def train(config: TrainConfig) -> None:
    """A whole run on this rank."""
    with tiny.opened(config) as trainer:
        trainer.run()


def train_and_weigh(config: TrainConfig) -> list[int]:
    """A whole run; bytes of the optimizer's state that this rank hands over for each checkpoint."""
    save, sizes = dist_checkpointing.save, []

    def weigh(state: dict, *args: object, **settings: object) -> object:
        kinds = ShardedTensor | ShardedTensorFactory
        parts = [part for part in nested_values(state["optimizer"]) if isinstance(part, kinds)]
        sizes.append(sum(part.data.nbytes for part in parts))
        return save(state, *args, **settings)

    with mock.patch.object(dist_checkpointing, "save", weigh):
        train(config)
    return sizes


def run(ranks: Pool, config: TrainConfig, layout: str, out: Path, **changes: object) -> Ended:
    """Weights and metrics of a run on a layout, written to ``out``; its output to ``out``.log."""
    config = on_layout(config, layout, out, **changes)
    ranks.run(NUM_RANKS[layout], train, config, log=out.with_suffix(".log"), timeout=300)
    return result(config)


def on_layout(config: TrainConfig, layout: str, out: Path, **changes: object) -> TrainConfig:
    # Long enough for a machine that is busy with other things.
    config = with_layout(config, layout)
    parallel = replace(config.parallel, distributed_timeout_minutes=TIMEOUT_MINUTES)
    values = {"out": str(out), "export_hf": True, **changes}
    return replace(config, parallel=parallel, run=replace(config.run, **values))


def result(config: TrainConfig) -> Ended:
    out = Path(config.run.out)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # Each step once, in order.
    assert [m["step"] for m in steps] == list(range(1, config.run.num_steps + 1))
    return load_weights(out / f"hf_step_{config.run.num_steps}"), steps


def load_weights(folder: Path) -> Weights:
    """All tensors of a Hugging Face folder; stages write files of their own."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert files
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_near(ours: Weights, theirs: Weights, start: Weights, bound: float) -> None:
    """Every tensor differs by at most ``bound`` of its movement."""
    assert ours.keys() == theirs.keys() == start.keys()
    for key, want in theirs.items():
        moved = (want - start[key]).norm()
        assert moved > 1e-3 * start[key].norm(), f"{key} did not train"
        error = float((ours[key] - want).norm() / moved)
        assert error <= bound, f"{key}: {error:.1e} of the movement"


def assert_same(ours: Ended, theirs: Ended) -> None:
    """Bit-identical weights and metrics; only times and memory may differ."""
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
    ours_steps, theirs_steps = (
        [{k: v for k, v in m.items() if k.split("/")[0] not in ("time", "perf")} for m in steps]
        for steps in (ours[1], theirs[1])
    )
    assert ours_steps == theirs_steps and "actor/loss" in ours_steps[0]


def written_out_run(config: TrainConfig, out: Path) -> None:
    """The run of ``config`` by the stock model, dense arrays and torch's own Adam."""
    groups = read_rollouts(config.rollout.files, vocab_size=VOCAB)
    case = dense.LossCase(kl=config.algorithm.policy.kl_loss_coef, dual=3.0)
    hf = Path(str(config.model.hf))
    with parallel_run(config.parallel, 0):
        models = []
        for _ in range(2):
            (model,) = stock.build(read_hf_config(hf), stock.Layout(), torch.float32, packed=False)
            load_hf([model], hf)
            models.append(model)

        def logits_of(model: torch.nn.Module) -> dense.LogitsOf:
            def call(tokens: torch.Tensor) -> torch.Tensor:
                n = len(tokens)
                mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
                return model(tokens[None], torch.arange(n)[None], mask)[0]

            return call

        def with_logprobs(batch: list[Group]) -> list[Group]:
            with torch.no_grad():
                old, ref = (dense.sample_logprobs(logits_of(m), batch, VOCAB) for m in models)
            numbers = iter(range(len(old)))
            return [
                replace(
                    g,
                    samples=tuple(
                        replace(s, old_logprobs=old[i].double(), ref_logprobs=ref[i].double())
                        for s, i in zip(g.samples, numbers)
                    ),
                )
                for g in batch
            ]

        policy = models[0]
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
            size = per_step // count
            for _ in range(config.algorithm.ppo_epochs):
                for first in range(0, per_step, size):
                    adam.zero_grad()
                    part = chosen[first : first + size]
                    dense.dense_loss(logits_of(policy), part, case, VOCAB).backward()
                    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                    adam.step()
        export_hf([policy], out, hf)
