"""A tiny random Llama, recorded rollouts for it, and configurations of short runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_pg.data import Group, Sample, write_rollouts
from tests.ranks import PYTHONPATH
from tests.utils import ROOT

VOCAB = 50
NUM_LAYERS = 4


def save_model(folder: Path, seed: int = 0) -> Any:
    """Write a Llama whose predictions are far from uniform; the transformers model comes back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of digits, signs and a few words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *map(str, range(10)), "+", "-", "=", ".", "?", ":", ","]
    words += ["State", "the", "final", "answer", "to", "following", "arithmetic", "problem"]
    words += ["user", "assistant"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    # Split at digits and signs; blanks go.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    assert len(vocab) <= VOCAB
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    fast.save_pretrained(folder)


def make_groups(
    num_groups: int = 7, seed: int = 0, *, has_rollout_logprobs: bool = False
) -> list[Group]:
    """Ragged groups: a group of one, equal responses, one-token responses, tool tokens.

    Two groups have equal prompts; group 2's rewards have no spread.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator)

    groups = []
    for number in range(num_groups):
        prompt = groups[0].samples[0].prompt_ids if number == 4 else tokens(3, 11)
        samples = []
        for place in range(1 if number == 3 else 4):
            response = tokens(1, 1) if place == 1 else tokens(2, 9)
            if place == 3:
                response = samples[2].response_ids
            mask = torch.ones(len(response), dtype=torch.bool)
            if place == 0 and len(mask) > 3:
                mask[1:3] = False
            logprobs = -torch.rand(len(response), generator=generator, dtype=torch.float64) - 2
            reward = 0.5 if number == 2 else float(torch.rand(1, generator=generator))
            samples.append(
                Sample(
                    prompt_ids=prompt,
                    response_ids=response,
                    reward=reward,
                    loss_mask=mask,
                    rollout_logprobs=logprobs if has_rollout_logprobs else None,
                    status="truncated" if place == 2 else "completed",
                )
            )
        groups.append(Group(f"g{number}", tuple(samples)))
    return groups


def with_advantages(groups: list[Group]) -> list[Group]:
    """The same groups, every response token with an advantage of 1 that was recorded."""
    return [
        Group(
            g.group_id,
            tuple(
                replace(s, advantages=torch.ones(len(s.response_ids)).double()) for s in g.samples
            ),
        )
        for g in groups
    ]


def one_sample_groups(groups: Sequence[Group], advantages: torch.Tensor) -> list[Group]:
    """Every sample as a group of its own with its advantage given: nothing to share."""
    written = []
    for group in groups:
        for i, sample in enumerate(group.samples):
            values = torch.full((len(sample.response_ids),), float(advantages[len(written)]))
            alone = replace(sample, advantages=values.double())
            written.append(Group(f"{group.group_id}/{i}", (alone,)))
    return written


def write_config(path: Path, sections: Mapping[str, Any], **overrides: Any) -> Path:
    """A YAML file; keywords ``section__key=value`` override single values."""
    content = {name: values and dict(values) for name, values in sections.items()}
    for key, value in overrides.items():
        section, name = key.split("__")
        content.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(content))
    return path


def run_sections(folder: Path, groups: Sequence[Group] | None = None) -> dict[str, dict[str, Any]]:
    """Sections of a short recorded run whose model and rollouts are written to ``folder``."""
    if not (folder / "model").is_dir():
        save_model(folder / "model")
    write_rollouts(groups or make_groups(), folder / "rollouts.jsonl")
    return {
        "model": {"hf": str(folder / "model")},
        # A larger epsilon than usual, which would turn rounding near zero into full steps.
        "optimizer": {"lr": 1e-3, "adam_eps": 1e-3},
        "rollout": {"files": [str(folder / "rollouts.jsonl")], "max_response_tokens": 10},
        "algorithm": {},
        "prefix_group": {"max_tokens_per_microbatch": 48, "logprob_chunk_tokens": 7},
        "run": {
            "out": str(folder / "out"),
            "num_steps": 3,
            "groups_per_step": 5,
            "tensorboard": False,
        },
    }


@contextmanager
def opened(config: Any) -> Iterator[Any]:
    """The trainer of a run on the ranks of this launch."""
    from megatron_pg.train import open_run, parallel_run

    with (
        parallel_run(config.parallel, config.run.seed) as ranks,
        open_run(config, ranks) as trainer,
    ):
        yield trainer


def first_step(folder: Path, **overrides: Any) -> dict[str, float]:
    """Metrics of the first step of such a run, on one rank in this process.

    ``rollout=`` takes the place of the recorded rollouts.
    """
    from megatron_pg.train import load_config

    folder.mkdir(parents=True, exist_ok=True)
    sections = run_sections(folder)
    save_tokenizer(folder / "model")
    sections["rollout"] = overrides.pop("rollout", sections["rollout"])
    config = load_config(write_config(folder / "run.yaml", sections, **overrides))
    with opened(config) as trainer:
        return trainer.train_step()


def launch(
    arguments: Sequence[str],
    *,
    num_ranks: int = 1,
    timeout: float = 240,
    commands: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_pg.train``, or under torchrun; ``commands`` is the fixture."""
    start = [sys.executable if commands is None else str(commands / "python"), "-m"]
    if num_ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    return subprocess.run(
        [*start, "megatron_pg.train", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def clean_environment() -> dict[str, str]:
    """Of a fresh shell: no launcher's variables, one thread."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
