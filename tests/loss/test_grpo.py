from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg.loss import (
    AGGREGATION_MODES,
    POLICY_LOSSES,
    PolicyLossConfig,
    aggregation_weights,
    grpo_loss,
    metric_means,
)
from tests.loss.dense import Ragged, random_advantages, random_logprobs
from tests.utils import assert_close

LENS = [5, 1, 0, 9, 3, 4]
RAGGED = Ragged.from_lens(LENS)
FULL = PolicyLossConfig(
    policy_loss="ppo_clip",
    clip_ratio_c=2.0,
    kl_loss_coef=0.1,
    kl_loss_type="k3",
    use_unbiased_kl=True,
    entropy_coeff=0.02,
    importance_mode="sequence_truncate",
)


def scale_factor(mode: str) -> float | None:
    return 16.0 if mode.endswith("norm") else None


def dense_mean(losses: Tensor, mask: Tensor, mode: str) -> Tensor:
    if mode == "token-mean":
        return losses[mask.bool()].mean()
    sums = (losses * mask).sum(1)
    if mode == "seq-mean-token-mean":
        sums = sums / mask.sum(1).clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        sums = sums / 16.0
    return sums.mean()


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_weights_equal_dense_aggregation(mode):
    losses = torch.randn(len(RAGGED.sample_ids), generator=torch.Generator().manual_seed(0))
    losses = losses.double()
    weights = aggregation_weights(torch.tensor(LENS), mode, loss_scale_factor=scale_factor(mode))
    assert weights.dtype == torch.float64 and weights[LENS.index(0)] == 0
    got = (weights[RAGGED.sample_ids] * losses).sum()
    assert_close(mode, got, dense_mean(RAGGED.pad(losses), RAGGED.mask, mode), 1e-13)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_weights_add_up(counts):
    n = torch.tensor(counts)
    trained = float((n > 0).sum()) / len(counts)
    for mode in ("token-mean", "seq-mean-token-mean"):
        total = float((aggregation_weights(n, mode) * n).sum())
        assert total == pytest.approx(1.0 if mode == "token-mean" else trained)
    scaled = aggregation_weights(n, "seq-mean-token-sum-norm", loss_scale_factor=4.0)
    assert torch.allclose(scaled * 4, aggregation_weights(n, "seq-mean-token-sum"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], "token_mean", None), "did you mean 'token-mean'"),
        (([0, 0], "token-mean", None), "skip the step"),
        (([], "token-mean", None), "must be a one-dimensional integer|skip the step"),
        (([1, -1], "token-mean", None), "at least 0"),
        (([1.0], "token-mean", None), "integer tensor"),
        (([[1]], "token-mean", None), "one-dimensional"),
        (([1], "seq-mean-token-sum-norm", None), "needs loss_scale_factor"),
        (([1], "seq-mean-token-sum-norm", 0.0), "loss_scale_factor=0.0"),
        (([1], "token-mean", 8.0), "loss_scale_factor=8.0 needs"),
    ],
)
def test_aggregation_refusals(arguments, message):
    counts, mode, factor = arguments
    with pytest.raises(ValueError, match=message):
        aggregation_weights(torch.tensor(counts), mode, loss_scale_factor=factor)


def make_inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    logprobs, old = random_logprobs(RAGGED, seed, scale=0.4)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = torch.randn(3, len(old), generator=generator, dtype=torch.float64) * 0.3
    counts = torch.tensor(LENS)
    return {
        "logprobs": logprobs.detach().to(dtype).requires_grad_(),
        "entropy": (noise[0].abs() + 0.5).to(dtype).requires_grad_(),
        "weights": aggregation_weights(counts, "seq-mean-token-mean")[RAGGED.sample_ids],
        "advantages": random_advantages(RAGGED, seed + 1),
        "old_logprobs": old,
        "ref_logprobs": old + noise[1],
        "rollout_logprobs": old + noise[2],
    }


def run(inputs: dict[str, Tensor], config: PolicyLossConfig = FULL) -> tuple:
    return grpo_loss(
        **inputs, sample_ids=RAGGED.sample_ids, num_samples=RAGGED.num_samples, config=config
    )


def test_whole_loss_equals_dense_formula():
    inputs = make_inputs()
    loss, sums = run(inputs)
    p = {name: RAGGED.pad(array) for name, array in inputs.items()}
    mask, adv = RAGGED.mask, p["advantages"]
    ratio = (p["logprobs"] - p["old_logprobs"]).exp()
    policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.28))
    policy = torch.where(adv < 0, torch.minimum(policy, -adv * 2.0), policy)
    log_weight = ((p["old_logprobs"] - p["rollout_logprobs"]) * mask).sum(1, keepdim=True)
    policy = policy * log_weight.exp().clamp(max=2.0)
    d = p["ref_logprobs"] - p["logprobs"]
    kl = ratio * (d.exp() - d - 1)
    terms = policy, 0.1 * kl, -0.02 * p["entropy"]
    want = dense_mean(sum(terms), mask, "seq-mean-token-mean")
    assert_close("loss", loss, want, 1e-13)
    names = ("policy_loss", "kl_loss", "entropy_loss")
    for name, term in zip(names, terms):
        assert_close(name, sums[name], dense_mean(term, mask, "seq-mean-token-mean"), 1e-13)
    leaves = [inputs["logprobs"], inputs["entropy"]]
    got_grads, want_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves)
    for name, got, wanted in zip(("dlogprobs", "dentropy"), got_grads, want_grads):
        assert_close(name, got, wanted, 1e-13)
    means = metric_means(sums)
    flat_d = RAGGED.flatten(d)
    assert means["loss"] == loss.item() and means["num_tokens"] == sum(LENS)
    assert means["kl"] == pytest.approx((flat_d.exp() - flat_d - 1).mean().item())
    assert means["entropy"] == pytest.approx(inputs["entropy"].mean().item())
    assert means["rollout_logprob_diff"] > 0.1 and means["importance_weight"] != 1
    assert all(not value.requires_grad and value.ndim == 0 for value in sums.values())


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_sum_is_the_same_for_any_split_and_order(name):
    config = PolicyLossConfig(
        policy_loss=name, kl_loss_coef=0.1, entropy_coeff=0.01, importance_mode="sequence_mask"
    )
    inputs = make_inputs(3)
    whole, whole_sums = run(inputs, config)
    whole.backward()
    total, sums = 0.0, {}
    split = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in inputs.items()}
    for samples in ([4], [5, 0, 2], [], [3, 1]):
        index = [torch.nonzero(RAGGED.sample_ids == i).flatten() for i in samples]
        index.append(torch.empty(0, dtype=torch.int64))
        rows = torch.cat(index)
        lens = torch.tensor([len(part) for part in index[:-1]], dtype=torch.int64)
        loss, part = grpo_loss(
            **{n: x[rows] for n, x in split.items()},
            sample_ids=torch.repeat_interleave(torch.arange(len(samples)), lens),
            num_samples=len(samples),
            config=config,
        )
        loss.backward()
        total += loss.item()
        sums = {n: sums.get(n, 0) + value for n, value in part.items()}
    assert total == pytest.approx(whole.item(), rel=1e-13)
    for name in ("logprobs", "entropy"):
        assert_close(name, split[name].grad, inputs[name].grad, 1e-13)
    assert set(sums) == set(whole_sums)
    for name, value in sums.items():
        torch.testing.assert_close(value, whole_sums[name], rtol=1e-12, atol=1e-12)


def test_missing_old_logprobs_mean_on_policy():
    inputs = make_inputs(5)
    config = PolicyLossConfig()
    explicit = dict(inputs, old_logprobs=inputs["logprobs"].detach())
    want, _ = run(explicit, config)
    del inputs["old_logprobs"]
    got, sums = run(inputs, config)
    assert got.item() == want.item()
    assert metric_means(sums)["ratio"] == 1
    got.backward()
    weighted = -inputs["weights"] * inputs["advantages"]
    assert_close("dlogprobs", inputs["logprobs"].grad, weighted, 1e-14)


def test_computes_in_fp64_and_leaves_gradients_in_the_input_dtype():
    inputs = make_inputs(6, dtype=torch.float32)
    loss, sums = run(inputs)
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in sums.values())
    assert inputs["logprobs"].grad.dtype == inputs["entropy"].grad.dtype == torch.float32


def test_optional_inputs_only_add_metrics():
    inputs = make_inputs(7)
    plain = {k: inputs[k] for k in ("logprobs", "weights", "advantages", "old_logprobs")}
    config = PolicyLossConfig()
    got, sums = run(inputs, config)
    want, plain_sums = run(plain, config)
    assert got.item() == want.item()
    assert set(sums) - set(plain_sums) == {"kl", "entropy", "rollout_logprob_diff"}
    assert metric_means({"num_tokens": torch.tensor(0.0), "kl": torch.tensor(0.0)})["kl"] == 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("entropy", "entropy_coeff=0.02 needs entropy"),
        ("ref_logprobs", "kl_loss_coef=0.1 needs ref_logprobs"),
        ("rollout_logprobs", "importance_mode='sequence_truncate' needs rollout_logprobs"),
    ],
)
def test_missing_inputs_are_refused(missing, message):
    inputs = make_inputs()
    del inputs[missing]
    with pytest.raises(ValueError, match=message):
        run(inputs)


@pytest.mark.parametrize("name", sorted(make_inputs()))
def test_unequal_lengths_are_refused(name):
    inputs = make_inputs()
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match="has shape"):
        run(inputs)


@pytest.mark.parametrize("which", ["policy_loss", "ratio"])
def test_a_policy_loss_of_one_s_own_is_per_token(which, monkeypatch):
    """A sum would count once for every token."""

    def summed(*arguments):
        loss, metrics = POLICY_LOSSES["reinforce"](*arguments)
        if which == "policy_loss":
            return loss.sum(), metrics
        return loss, metrics | {"ratio": metrics["ratio"].sum()}

    monkeypatch.setitem(POLICY_LOSSES, "summed", summed)
    with pytest.raises(ValueError, match=rf"{which} has shape \(\), .* length of logprobs"):
        run(make_inputs(), dataclasses.replace(FULL, policy_loss="summed", clip_ratio_c=None))
