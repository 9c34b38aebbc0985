"""Sampling with the Megatron model itself: every prompt is encoded once for all its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tree import PrefixTree, pack_trees
from .cache import GenerationCache
from .rows import DecodeSeqParams, PrefillSeqParams
from .sampling import Sampler, sample_uniforms
from .stages import ModelStages


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedResponse:
    """One sampled response, on the CPU.

    Attributes:
        response_ids: ``[R]`` int64, at least one token; a stop token that ended it is its last.
        logprobs: ``[R]`` float64 logprobs of ``softmax(logits / temperature)`` over the whole
            vocabulary: top_k and top_p do not change them. Greedy responses have those of
            temperature 1.
        is_finished: whether a stop token ended it; False when it was cut at the longest length.
    """

    response_ids: Tensor
    logprobs: Tensor
    is_finished: bool


def generate(
    model_chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Tensor],
    *,
    num_generations: int,
    max_response_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    max_batch_samples: int | None = None,
    prompt_numbers: Sequence[int] | None = None,
) -> list[tuple[GeneratedResponse, ...]]:
    """Sample responses from the model that is being trained, under its own parallel layout.

    Equals sampling every response alone with the stock model on written-out sequences. A prompt is
    encoded once and its keys and values exist once, however many responses attend to them; each has
    a copy of its states. Each step gives every live sample one token. Called on every rank of a
    model replica with equal arguments; every such rank gets the result. Replicas, and
    context-parallel ranks, sample their own prompts, as many as each has, if any; where they share
    experts, all of them call this and return together.

    A sample's randomness depends on ``seed``, its prompt's number and its place in the group only,
    not on batches, on other samples or on the parallel layout.

    Args:
        model_chunks: this rank's ``PrefixGroupedGPTModel`` or ``PrefixGroupedHybridModel`` chunks,
            wrapped or not; several under an interleaved pipeline.
        prompts: one ``[P]`` int64 CPU tensor each, at least one token; there may be none.
        num_generations: responses per prompt.
        max_response_tokens: longest response.
        seed: of the randomness, at least 0.
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample from the k likeliest tokens; 0 or None for all.
        top_p: sample from the fewest likeliest tokens that reach this probability.
        stop_token_ids: tokens that end a response.
        vocab_size: real entries of the vocabulary, later ones are never sampled; all when None.
        max_batch_samples: samples that are live at once, a multiple of whole groups; bounds the
            memory of keys, values and states. All when None.
        prompt_numbers: numbers of the prompts for the randomness, e.g. their place among all
            replicas' prompts; 0, 1, 2, ... when None.

    Returns:
        ``num_generations`` responses of every prompt, in the prompts' order.

    Raises:
        ValueError: on an argument outside its range, tokens outside the vocabulary, or sequences
            longer than learned position embeddings; on all that share experts.
    """
    stages = ModelStages(model_chunks)
    padded_vocab = stages.chunks[0].vocab_size
    vocab_size = padded_vocab if vocab_size is None else vocab_size
    numbers = range(len(prompts)) if prompt_numbers is None else prompt_numbers

    def checked_sampler() -> Sampler:
        if not 1 <= vocab_size <= padded_vocab:
            raise ValueError(
                f"vocab_size={vocab_size} must lie in [1, {padded_vocab}], the model's"
            )
        _check_counts(num_generations, max_response_tokens, seed, max_batch_samples)
        _check_prompts(prompts, numbers, vocab_size)
        _check_stop_tokens(stop_token_ids, vocab_size)
        _check_positions(stages, max(map(len, prompts), default=0) + max_response_tokens)
        return Sampler(temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size)

    sampler = stages.before_sampling(checked_sampler)
    stop_tokens = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64)
    batch_prompts = max(len(prompts), 1)
    if max_batch_samples is not None:
        batch_prompts = max_batch_samples // num_generations
    groups = []
    with stages.evaluating():
        for first in range(0, len(prompts), batch_prompts):
            batch = slice(first, first + batch_prompts)
            uniforms = sample_uniforms(seed, numbers[batch], num_generations, max_response_tokens)
            groups += _generate_batch(stages, prompts[batch], uniforms, sampler, stop_tokens)
        stages.finish()
    return groups


def _generate_batch(
    stages: ModelStages,
    prompts: Sequence[Tensor],
    uniforms: Tensor,
    sampler: Sampler,
    stop_tokens: Tensor,
) -> list[tuple[GeneratedResponse, ...]]:
    """All responses of some prompts; ``uniforms`` is [prompts, generations, longest response]."""
    num_prompts, num_generations, max_response_tokens = uniforms.shape
    prompt_lens = [len(prompt) for prompt in prompts]
    cache = GenerationCache(prompt_lens, num_generations, max_response_tokens, stages.device)
    record = _Record(num_prompts * num_generations, max_response_tokens)

    logits = _prefill(stages, prompts, cache)
    tokens, logprobs = stages.sample(logits, sampler, uniforms[:, :, 0])
    tokens, logprobs = tokens.flatten(), logprobs.flatten()
    uniforms = uniforms.flatten(0, 1)
    for step in range(max_response_tokens):
        is_stopped = torch.isin(tokens, stop_tokens)
        record.add(step, cache.samples, tokens, logprobs, is_stopped)
        tokens = tokens[cache.drop_rows(~is_stopped)]
        if len(tokens) == 0 or step + 1 == max_response_tokens:
            break
        params = DecodeSeqParams.of_rows(cache, stages.row_multiple)
        padding = len(params.position_ids) - len(tokens)
        logits = stages.forward(torch.nn.functional.pad(tokens, (0, padding)), params)
        rows = uniforms[cache.samples, step + 1, None]
        tokens, logprobs = (x[:, 0] for x in stages.sample(logits, sampler, rows))
    responses = record.responses()
    return [
        tuple(responses[i : i + num_generations]) for i in range(0, len(responses), num_generations)
    ]


def _prefill(
    stages: ModelStages, prompts: Sequence[Tensor], cache: GenerationCache
) -> Tensor | None:
    """Encode all prompts in one row; logits of their last tokens on the last stage."""
    trees = [PrefixTree.from_sequences([prompt]) for prompt in prompts]
    layout = pack_trees(trees, pad_to_multiple=stages.row_multiple)
    return stages.forward(layout.token_ids, PrefillSeqParams.from_prompts(layout, cache))


class _Record:
    """What was sampled so far, one line per sample."""

    def __init__(self, num_samples: int, max_response_tokens: int) -> None:
        self._tokens = torch.zeros(num_samples, max_response_tokens, dtype=torch.int64)
        self._logprobs = torch.zeros(num_samples, max_response_tokens, dtype=torch.float64)
        self._lens = torch.zeros(num_samples, dtype=torch.int64)
        self._is_finished = torch.zeros(num_samples, dtype=torch.bool)

    def add(
        self, step: int, samples: Tensor, tokens: Tensor, logprobs: Tensor, is_stopped: Tensor
    ) -> None:
        """Write one token of every live sample."""
        self._tokens[samples, step] = tokens
        self._logprobs[samples, step] = logprobs
        self._lens[samples] = step + 1
        self._is_finished[samples] = is_stopped

    def responses(self) -> list[GeneratedResponse]:
        """One value per sample, cut to its length."""
        return [
            GeneratedResponse(
                response_ids=tokens[:length].clone(),
                logprobs=logprobs[:length].clone(),
                is_finished=is_finished,
            )
            for tokens, logprobs, length, is_finished in zip(
                self._tokens, self._logprobs, self._lens.tolist(), self._is_finished.tolist()
            )
        ]


def _check_counts(
    num_generations: int, max_response_tokens: int, seed: int, max_batch_samples: int | None
) -> None:
    if num_generations < 1 or max_response_tokens < 1 or seed < 0:
        raise ValueError(
            f"num_generations={num_generations} and max_response_tokens={max_response_tokens} "
            f"must be at least 1, seed={seed} at least 0"
        )
    if max_batch_samples is not None and max_batch_samples < num_generations:
        raise ValueError(
            f"max_batch_samples={max_batch_samples} must be at least num_generations="
            f"{num_generations}: a group is sampled together, its prompt encoded once"
        )


def _check_prompts(prompts: Sequence[Tensor], numbers: Sequence[int], vocab_size: int) -> None:
    if len(numbers) != len(prompts) or min(numbers, default=0) < 0:
        raise ValueError(
            f"prompt_numbers has {len(numbers)} entries for {len(prompts)} prompts, "
            f"the least is {min(numbers, default=None)}; give one number >= 0 per prompt"
        )
    for i, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.dtype != torch.int64 or len(prompt) == 0 or prompt.is_cuda:
            raise ValueError(
                f"prompts[{i}] must be a non-empty int64 vector on the CPU, got shape "
                f"{tuple(prompt.shape)}, {prompt.dtype} on {prompt.device}"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
            raise ValueError(f"prompts[{i}] has tokens outside [0, {vocab_size}), the vocabulary")


def _check_stop_tokens(stop_token_ids: Sequence[int], vocab_size: int) -> None:
    wrong = [token for token in stop_token_ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"stop_token_ids {wrong} lie outside [0, {vocab_size}), the vocabulary")


def _check_positions(stages: ModelStages, longest: int) -> None:
    chunk = stages.chunks[0]
    if chunk.position_embedding_type == "learned_absolute" and longest > chunk.max_sequence_length:
        raise ValueError(
            f"the longest prompt and max_response_tokens make {longest} tokens, learned positions "
            f"end at max_sequence_length={chunk.max_sequence_length}; shorten one of them"
        )
