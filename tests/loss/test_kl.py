from __future__ import annotations

import pytest
import torch

from megatron_pg.loss import KL_KINDS, kl_in_reward, kl_penalty
from tests.loss.dense import Ragged, random_logprobs
from tests.utils import assert_close

RAGGED = Ragged.from_lens([4, 0, 6, 1])
# value and derivative by logp, with d = ref - logp
FORMULAS = {
    "k1": (lambda d: -d, lambda d: torch.ones_like(d)),
    "k2": (lambda d: d * d / 2, lambda d: -d),
    "k3": (lambda d: d.exp() - d - 1, lambda d: 1 - d.exp()),
}
ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


@pytest.mark.parametrize("kind", KL_KINDS)
def test_values_and_gradients(kind):
    logprobs, ref = random_logprobs(RAGGED, 0)
    base = kind.rstrip("+")
    value, slope = FORMULAS[ALIASES.get(base, base)]
    slope = FORMULAS["k2"][1] if kind.endswith("+") else slope
    got = kl_penalty(logprobs, ref, kind)
    d = (ref - logprobs).detach()
    assert_close("kl", got, value(d), 1e-13)
    got.sum().backward()
    assert_close("dlogprobs", logprobs.grad, slope(d), 1e-13)


def test_all_names_are_tried():
    assert len(KL_KINDS) == 12


def test_k3_is_clamped():
    got = kl_penalty(torch.tensor([-30.0, 30.0, 0.0]), torch.tensor([0.0, 0.0, 2.0]), "k3")
    assert_close("kl", got, torch.tensor([10.0, 10.0, 2.718281828459045**2 - 3]), 1e-6)


def test_k3_has_the_mean_of_the_divergence():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    divergence = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        assert_close(kind, (p * kl_penalty(p.log(), q.log(), kind)).sum(), divergence, 1e-14)


def test_kl_in_reward():
    logprobs, ref = random_logprobs(RAGGED, 1)
    rewards = torch.arange(4.0)
    got = kl_in_reward(rewards, logprobs, ref, RAGGED.sample_ids, kl_coef=0.3, kind="k2")
    penalty = RAGGED.pad((ref - logprobs) ** 2 / 2).sum(1)
    assert_close("rewards", got, rewards.double() - 0.3 * penalty.detach(), 1e-14)
    assert got[1] == 1 and not got.requires_grad
    k1 = kl_in_reward(rewards, logprobs, ref, RAGGED.sample_ids, kl_coef=0.3)
    difference = RAGGED.pad(logprobs - ref).sum(1).detach()
    assert_close("k1", k1, rewards.double() - 0.3 * difference, 1e-14)


def test_refusals():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="did you mean 'k3"):
        kl_penalty(x, x, "k33")
    with pytest.raises(ValueError, match="ref_logprobs has shape"):
        kl_penalty(x, x[:2], "k1")
    with pytest.raises(ValueError, match="kl_coef=-1"):
        kl_in_reward(x, x, x, torch.zeros(3).long(), kl_coef=-1)
    with pytest.raises(ValueError, match="sample_ids has shape"):
        kl_in_reward(x, x, x, torch.zeros(2).long(), kl_coef=1)
