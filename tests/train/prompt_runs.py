"""Runs on prompts of files, and what their steps brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_pg.train import TrainConfig, load_config
from tests.train import late_imports, prompt_rewards, tiny  # noqa: F401

NUM_PROMPTS, PER_STEP = 9, 4
MODULE = "tests.train.prompt_rewards"


def config_of(folder: Path, reward: Any, **overrides: Any) -> TrainConfig:
    """Sums of nine prompts, four a step: the third step spans two epochs."""
    sections = tiny.run_sections(folder)
    tiny.save_tokenizer(folder / "model")
    rows = [
        {
            "question": f"{n} + {n} = ?",
            "n": n,
            "data_source": "digits",
            "extra_info": {"n": n},
            "reward_model": {"ground_truth": n},
        }
        for n in range(NUM_PROMPTS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text(json.dumps({**rows[0], "question": "7 - 3 = ?"}) + "\n")
    sections["rollout"] = {
        "source": "model",
        "num_generations": 4,
        "max_response_tokens": 8,
        "prompts": {
            "files": [str(folder / "*.jsonl").replace("*", "train")],
            "val_files": [str(folder / "val.jsonl")],
            "prompt_key": "question",
        },
        "reward": reward,
    }
    sections["prefix_group"]["max_tokens_per_microbatch"] = 96
    sections["run"] |= {
        "groups_per_step": PER_STEP,
        "self_check_interval": None,
        "eval_prompts": 1,
    }
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def steps_of(config: TrainConfig) -> tuple[list[Any], list[dict[str, float]]]:
    """(text, reward, metadata) of every sample that this rank judged, and the metrics."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.hf)
    samples, metrics = [], []
    with tiny.opened(config) as trainer:
        next_groups = trainer.stream.next_groups

        def bring(num_groups: int) -> Any:
            groups = next_groups(num_groups)
            for group in groups.values():
                for one in group.samples:
                    text = tokenizer.decode(one.response_ids.tolist(), skip_special_tokens=True)
                    samples.append((group.group_id, text, one.reward, dict(one.metadata)))
            return groups

        trainer.stream.next_groups = bring
        for _ in range(config.run.num_steps):
            metrics.append(trainer.train_step())
    return samples, metrics
