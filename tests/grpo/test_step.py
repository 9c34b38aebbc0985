"""What a step runs, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
)

from megatron_pg.grpo import (  # noqa: E402
    GrpoConfig,
    GrpoStep,
    MegatronReplicas,
    PrefixGroupConfig,
    Ranks,
    step,
)
from megatron_pg.mcore import model, with_prefix_grouped_attention  # noqa: E402
from megatron_pg.train import load_config  # noqa: E402
from tests.grpo import on_ranks  # noqa: E402
from tests.mcore import harness  # noqa: E402
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


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.01])
@pytest.mark.parametrize("calculate_entropy", [True, False])
def test_the_entropy_is_made_where_something_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calculate_entropy: bool, entropy_coeff: float
) -> None:
    config = config_of(
        tmp_path,
        algorithm__calculate_entropy=calculate_entropy,
        algorithm__policy={"entropy_coeff": entropy_coeff},
    )
    asked: list[bool] = []
    original = model.vocab_parallel_logprobs

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["with_entropy"])
        return original(*arguments, **options)

    monkeypatch.setattr(model, "vocab_parallel_logprobs", noted)
    with tiny.opened(config) as trainer:
        batch = trainer.grpo.prepare(trainer.stream.next_groups(5))
        asked.clear()
        sums = trainer.grpo.backward(batch, 0)
    is_read = calculate_entropy or entropy_coeff > 0
    assert asked == [is_read] * len(asked) and asked
    assert ("entropy" in sums) == is_read and ("entropy_loss" in sums) == (entropy_coeff > 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("calculate_per_token_loss", False, "calculate_per_token_loss=True"),
        ("finalize_model_grads_func", None, "megatron.core.distributed.finalize_model_grads"),
        ("param_sync_func", print, "overlap_param_gather=True lets modules wait"),
        ("overlap_param_gather", True, "overlap_param_gather=True lets modules wait"),
        ("overlap_grad_reduce", True, "overlap_grad_reduce=True without no_sync_func"),
    ],
)
def test_configurations_that_scale_or_leave_gradients_are_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    config = config_of(tmp_path)
    with tiny.opened(config) as trainer:
        config = trainer.model.plan.config
        owner = config if hasattr(config, name) else trainer.model.chunks[0].ddp_config
        setattr(owner, name, value)
        with pytest.raises(ValueError, match=message):
            GrpoStep(trainer.model.chunks, vocab_size=tiny.VOCAB)


@pytest.fixture
def chunks() -> Iterator[list[Any]]:
    """A model of one's own on one rank, wrapped as Megatron trains it."""
    with harness.on_cpu():
        harness.initialize(harness.Case())
        yield on_ranks.make_chunks(harness.Case())


def stock_model(chunks: list[Any]) -> list[Any]:
    spec = with_prefix_grouped_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
    return [GPTModel(chunks[0].config, spec, harness.VOCAB, harness.MAX_LEN)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda chunks: {"chunks": chunks[0]}, "got a DistributedDataParallel; pass [model]"),
        (lambda chunks: {"chunks": []}, "at least one model chunk"),
        (lambda chunks: {"chunks": [chunks[0].module]}, "DistributedDataParallel"),
        (lambda chunks: {"chunks": stock_model(chunks)}, "chunks has a GPTModel"),
        (lambda chunks: {"reference": stock_model(chunks)}, "reference has a GPTModel"),
        (lambda chunks: {"vocab_size": 65}, "vocab_size=65, but chunks was built for 64"),
        (lambda chunks: {"algorithm": GrpoConfig(num_minibatches=0)}, "num_minibatches=0 must"),
        (
            lambda chunks: {"settings": PrefixGroupConfig(max_resident_tokens=0)},
            "max_resident_tokens=0",
        ),
    ],
    ids=["one", "none", "bare", "stock", "reference", "vocab", "minibatches", "resident"],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    chunks: list[Any], arguments: Callable[[list[Any]], dict[str, Any]], message: str
) -> None:
    given = {"chunks": chunks, "vocab_size": harness.VOCAB, **arguments(chunks)}
    with pytest.raises(ValueError) as error:
        GrpoStep(given.pop("chunks"), **given)
    assert message in str(error.value)


def test_a_minibatch_that_a_batch_does_not_have_is_refused(chunks: list[Any]) -> None:
    own = GrpoStep(chunks, vocab_size=harness.VOCAB, algorithm=GrpoConfig(num_minibatches=2))
    batch = own.prepare(tiny.make_groups(4))
    assert own.backward(batch, 1)["num_tokens"] > 0
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=f"minibatch={wrong}, but 2 minibatches"):
            own.backward(batch, wrong)


def test_a_batch_is_read_and_not_changed(chunks: list[Any]) -> None:
    """Steps of other algorithms on the same chunks, and further epochs, leave it as it is."""
    two = GrpoStep(chunks, vocab_size=harness.VOCAB, algorithm=GrpoConfig(num_minibatches=2))
    one = GrpoStep(chunks, vocab_size=harness.VOCAB)
    batch, other = two.prepare(tiny.make_groups(4)), one.prepare(tiny.make_groups(4))
    first = two.backward(batch, 1)
    before = harness.named_gradients(chunks)
    assert one.backward(other)["loss"] != first["loss"]
    assert two.backward(batch, 1) == first
    after = harness.named_gradients(chunks)
    assert all((before[name] == after[name]).all() and before[name].any() for name in before)


def test_a_device_without_gloo_groups_is_refused(
    chunks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks.from_megatron()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    MegatronReplicas(ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="create_gloo_process_groups=False; leave that"):
        MegatronReplicas(ranks)
