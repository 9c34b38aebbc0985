"""What a step runs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.grpo import GrpoStep, step  # noqa: E402
from megatron_pg.train import load_config  # noqa: E402
from tests.train import tiny  # noqa: E402


def config_of(folder: Path, **overrides: Any) -> Any:
    sections = tiny.run_sections(folder)
    sections["run"]["num_steps"] = 1
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def test_rows_run_once_for_the_policy_and_once_for_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the KL in the reward, logprobs are those of the minibatches and of what is left out."""
    tiny.save_model(tmp_path / "reference", seed=1)
    config = config_of(
        tmp_path,
        algorithm__ref_hf=str(tmp_path / "reference"),
        algorithm__use_kl_in_reward=True,
        algorithm__num_minibatches=2,
        algorithm__ppo_epochs=2,
        algorithm__skip_groups_without_spread=True,
        run__self_check_interval=None,
    )
    runs: list[tuple[bool, int]] = []
    original = step.compute_logprobs

    def counted(chunks: Any, waves: Any, *arguments: Any) -> Any:
        is_policy = chunks is not trainer.grpo.reference
        runs.append((is_policy, sum(len(wave.microbatches) for wave in waves)))
        return original(chunks, waves, *arguments)

    with tiny.opened(config) as trainer:
        monkeypatch.setattr(step, "compute_logprobs", counted)
        batch = trainer.grpo.prepare(trainer.stream.next_groups(5))
    rows = [len(part.rows) for part in batch.parts(with_left_out=True)]
    assert batch.left_out is not None and len(batch.minibatches) == 2
    assert runs == [(policy, n) for policy in (True, False) for n in rows]
    assert batch.kl_of_samples is not None and len(batch.kl_of_samples.unique()) > 10


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("calculate_per_token_loss", False, "calculate_per_token_loss=True"),
        ("finalize_model_grads_func", None, "megatron.core.distributed.finalize_model_grads"),
    ],
)
def test_configurations_that_scale_or_leave_gradients_are_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    config = config_of(tmp_path)
    with tiny.opened(config) as trainer:
        setattr(trainer.model.plan.config, name, value)
        with pytest.raises(ValueError, match=message):
            GrpoStep(trainer.model.chunks, vocab_size=tiny.VOCAB)
