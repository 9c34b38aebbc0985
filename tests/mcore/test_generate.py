"""Sampling: the choice of tokens by itself, and whole models on ranks."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.mcore.generation import Sampler, sample_uniforms  # noqa: E402
from megatron_pg.mcore.generation.cache import _close_holes  # noqa: E402
from tests.mcore.generate_checks import CHECKS, run  # noqa: E402
from tests.mcore.generate_harness import CASES, LAYOUTS, MODELS  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.megatron

NUM_DRAWS = 20_000


def make_sampler(**changes: object) -> Sampler:
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, vocab_size=8)
    return Sampler(**{**settings, **changes})  # type: ignore[arg-type]


def truncated(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after truncation, by the definition."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or len(logits)]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached >= top_p:
            break
    share = sum(weights[i] for i in kept)
    return [weights[i] / share if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "num_kept"),
    [(1.0, 0, 1.0, 8), (0.7, 3, 1.0, 3), (1.3, 0, 0.8, 5), (0.9, 5, 0.75, 3), (2.0, 1, 0.5, 1)],
)
def test_frequencies(
    dtype: torch.dtype, temperature: float, top_k: int, top_p: float, num_kept: int
) -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 1.0, 0.0, -0.5, 1.5, 0.25, 99.0, 99.0]], dtype=dtype)
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = sample_uniforms(7, [3], 1, NUM_DRAWS)[0]
    tokens, logprobs = sampler(logits, uniforms)
    assert tokens.shape == logprobs.shape == (1, NUM_DRAWS)
    assert logprobs.dtype == torch.promote_types(dtype, torch.float32)
    whole = (logits[0, :8].double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double()[0], whole[tokens[0]], rtol=0, atol=1e-6)
    expected = torch.tensor(truncated(logits[0, :8].tolist(), temperature, top_k, top_p))
    counts = torch.bincount(tokens[0], minlength=8)
    is_kept = expected > 0
    assert int(is_kept.sum()) == num_kept and not counts[~is_kept].any()
    expected = expected * NUM_DRAWS
    chi_square = float(((counts - expected) ** 2 / expected)[is_kept].sum())
    assert chi_square < 25, chi_square  # at most 7 degrees of freedom


def test_rare_tokens_of_a_large_vocabulary_are_reached() -> None:
    # The last thousand tokens share 1e-5 of the probability behind 49152 likelier ones.
    logits = torch.zeros(1, 50_152)
    logits[0, -1000:] = math.log(49_152e-5 / 1000)
    sampler = make_sampler(vocab_size=50_152)
    uniforms = torch.linspace(1 - 1e-5, 1 - 1e-12, 1000, dtype=torch.float64)[None]
    tokens, _ = sampler(logits, uniforms)
    assert len(tokens.unique()) > 990 and int(tokens.min()) >= 49_150


def test_uniforms_belong_to_their_sample() -> None:
    uniforms = sample_uniforms(1, [4, 9], 3, 50)
    assert uniforms.shape == (2, 3, 50) and bool(((uniforms >= 0) & (uniforms < 1)).all())
    assert len(uniforms.unique()) == uniforms.numel()
    assert torch.equal(sample_uniforms(1, [9], 2, 20)[0], uniforms[1, :2, :20])
    assert not torch.equal(sample_uniforms(2, [4, 9], 3, 50), uniforms)


def test_close_holes() -> None:
    order, holes, movers = _close_holes(torch.tensor([1, 0, 1, 0, 1]).bool())
    assert (order.tolist(), holes.tolist(), movers.tolist()) == ([0, 4, 2], [1], [4])
    assert _close_holes(torch.zeros(3).bool())[0].tolist() == []


@pytest.mark.parametrize("name", [*MODELS, *CHECKS, *LAYOUTS])
def test_generate(ranks: Pool, name: str) -> None:
    """Equals the stock model on one rank; on several, the model on one rank."""
    num_ranks = CASES[name].world_size if name not in CHECKS else 1
    assert (num_ranks > 1) == (name in LAYOUTS)
    ranks.run(num_ranks, run, name)
