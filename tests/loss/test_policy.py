from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_pg.loss import POLICY_LOSSES, PolicyLossConfig, register_policy_loss
from tests.loss.dense import Ragged, random_advantages, random_logprobs
from tests.utils import assert_close

RAGGED = Ragged.from_lens([7, 3, 0, 11, 1, 5])


def dense_loss(
    logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, config: PolicyLossConfig
) -> Tensor:
    """[N, L] losses by cases, differentiated by autograd; padding is arbitrary."""
    name, low, high = config.policy_loss, 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    if name == "reinforce":
        return -adv * logp
    if name == "gspo":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        sequence = (((logp - old) * mask).sum(1, keepdim=True) / lengths).detach()
        ratio = torch.exp(sequence + (logp - logp.detach()))
    else:
        ratio = torch.exp(logp - old)
    if name == "cispo":
        weight = ratio.detach().clone()
        weight[weight < low], weight[weight > high] = low, high
        return -weight * adv * logp
    # A token is held when it has already moved past the bound in the direction of its advantage.
    held_high, held_low = (adv > 0) & (ratio > high), (adv < 0) & (ratio < low)
    loss = torch.where(held_high, -adv * high, torch.where(held_low, -adv * low, -adv * ratio))
    if config.clip_ratio_c is not None:
        too_far = (adv < 0) & (ratio > config.clip_ratio_c)
        loss = torch.where(too_far, -adv * config.clip_ratio_c, loss)
    return loss


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss": "ppo_clip", "clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        {"policy_loss": "ppo_clip", "clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        {"policy_loss": "ppo_clip", "clip_ratio_c": 1.5},
        {"policy_loss": "gspo", "clip_ratio_low": 0.1, "clip_ratio_high": 0.05},
        {"policy_loss": "cispo"},
        {"policy_loss": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 4.0},
        {"policy_loss": "reinforce"},
    ],
)
def test_equals_dense_formula(options):
    config = PolicyLossConfig(**options)
    logprobs, old = random_logprobs(RAGGED, 1, scale=1.0)
    advantages = random_advantages(RAGGED, 2)
    weights = torch.rand(len(old), generator=torch.Generator().manual_seed(3)).double()
    got, metrics = POLICY_LOSSES[config.policy_loss](
        logprobs, old, advantages, RAGGED.sample_ids, RAGGED.num_samples, config
    )
    want = dense_loss(
        RAGGED.pad(logprobs), RAGGED.pad(old), RAGGED.pad(advantages), RAGGED.mask, config
    )
    assert_close("loss", got, RAGGED.flatten(want), 1e-13)
    (got_grad,) = torch.autograd.grad((got * weights).sum(), logprobs)
    want_total = (want * RAGGED.pad(weights) * RAGGED.mask).sum()
    (want_grad,) = torch.autograd.grad(want_total, logprobs)
    assert_close("dlogprobs", got_grad, want_grad, 1e-13)
    assert all(not m.requires_grad and m.shape == old.shape for m in metrics.values())
    keys = {"ratio", "ppo_kl", "clipfrac_low", "clipfrac_high", "clipfrac_dual"}
    assert set(metrics) == keys
    is_held = (metrics["clipfrac_low"] + metrics["clipfrac_high"] + metrics["clipfrac_dual"]) > 0
    if config.policy_loss in ("ppo_clip", "gspo"):
        assert torch.equal(got_grad == 0, is_held)
        assert 0 < is_held.sum() < len(is_held)
        assert metrics["clipfrac_low"].sum() > 0 and metrics["clipfrac_high"].sum() > 0
    else:
        assert (got_grad != 0).all()
    assert (metrics["clipfrac_dual"].sum() > 0) == (config.clip_ratio_c is not None)
    assert_close("ppo_kl", metrics["ppo_kl"], old - logprobs, 1e-13)


def test_cispo_metrics_count_both_signs_of_advantage():
    old = torch.zeros(4).double()
    logprobs = torch.tensor([2.0, 2.0, -2.0, -2.0]).double()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    config = PolicyLossConfig(policy_loss="cispo")
    ids = torch.zeros(4).long()
    _, metrics = POLICY_LOSSES["cispo"](logprobs, old, advantages, ids, 1, config)
    assert metrics["clipfrac_high"].tolist() == [1, 1, 0, 0]
    assert metrics["clipfrac_low"].tolist() == [0, 0, 1, 1]


def test_gspo_gradient_is_that_of_the_sequence_form_after_seq_mean_token_mean():
    logprobs, old = random_logprobs(RAGGED, 4, scale=0.1)
    advantages = random_advantages(RAGGED, 5)
    config = PolicyLossConfig(policy_loss="gspo", clip_ratio_low=0.02, clip_ratio_high=0.02)
    loss, metrics = POLICY_LOSSES["gspo"](
        logprobs, old, advantages, RAGGED.sample_ids, RAGGED.num_samples, config
    )
    lens = torch.tensor(RAGGED.lens).double()
    (got,) = torch.autograd.grad((loss / lens[RAGGED.sample_ids]).sum(), logprobs)
    total = torch.zeros(()).double()
    for i in range(RAGGED.num_samples):
        rows = RAGGED.sample_ids == i
        if not rows.any():
            continue
        ratio = (logprobs[rows] - old[rows]).mean().exp()
        adv = advantages[rows][0]
        total = total - torch.minimum(ratio * adv, ratio.clamp(0.98, 1.02) * adv)
    (want,) = torch.autograd.grad(total, logprobs)
    assert_close("dlogprobs", got, want, 1e-12)
    assert 0 < (want == 0).sum() < len(want)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_extreme_ratios_stay_finite(name):
    logprobs = torch.tensor([0.0, -1e4, 0.0]).double().requires_grad_()
    old = torch.tensor([-1e4, 0.0, 0.0]).double()
    ids = torch.tensor([0, 1, 2])
    loss, metrics = POLICY_LOSSES[name](
        logprobs, old, -torch.ones(3).double(), ids, 3, PolicyLossConfig(policy_loss=name)
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all()
    assert metrics["ratio"].max() > 2e4 and metrics["ratio"].min() < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss": "ppo-clip"}, "did you mean 'ppo_clip'"),
        ({"policy_loss": "zzz"}, "must be one of cispo, gspo, ppo_clip, reinforce$"),
        ({"kl_loss_type": "low_var"}, "did you mean 'low_var_kl'"),
        ({"clip_ratio_low": -0.1}, "clip_ratio_low=-0.1"),
        ({"clip_ratio_high": float("nan")}, "clip_ratio_high=nan"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c=1.0 must be finite and above 1"),
        ({"clip_ratio_c": 3.0, "policy_loss": "gspo"}, "clip_ratio_c=3.0 needs"),
        ({"kl_loss_coef": -1.0}, "kl_loss_coef=-1.0"),
        ({"entropy_coeff": float("inf")}, "entropy_coeff=inf"),
        ({"use_unbiased_kl": True}, "use_unbiased_kl=True needs"),
        ({"importance_mode": "tokenmask"}, "did you mean 'token_mask'"),
        ({"importance_low": 0.5}, "need an importance_mode"),
        ({"importance_high": 0.5}, "need an importance_mode"),
        ({"importance_mode": "token_mask", "importance_low": 6.0}, "must not exceed"),
        ({"importance_mode": "token_mask", "importance_low": -1.0}, "low=-1.0"),
        ({"importance_mode": "token_truncate", "importance_high": 0.0}, "above 0"),
    ],
)
def test_config_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**options)


def test_registry_refuses_a_taken_name_and_returns_the_function():
    with pytest.raises(ValueError, match="registered already"):
        register_policy_loss("gspo")(POLICY_LOSSES["gspo"])
    try:
        assert register_policy_loss("custom")(POLICY_LOSSES["gspo"]) is POLICY_LOSSES["gspo"]
        assert PolicyLossConfig(policy_loss="custom").policy_loss == "custom"
    finally:
        del POLICY_LOSSES["custom"]
