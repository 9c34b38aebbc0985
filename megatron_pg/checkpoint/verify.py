"""Whether two checkpoints of either kind hold the same weights, and compute the same.

For the latter a Hugging Face folder is run by transformers, Megatron's by GPTModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .convert import Progress
from .folders import (
    CarriedTensors,
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    WeightSource,
    is_optimizer_state,
    is_torch_dist,
)
from .load import load_weights
from .one_rank import build_gpt, one_rank
from .reshard import is_vocabulary
from .table import shifted

# tokens [L] -> logits [L, vocab_size]
Forward = Callable[[Tensor], Tensor]
# Fields of the description that the weights do not depend on.
_FREE = {"dtype", "max_sequence_length", "mtp_num_layers"}


def compare_weights(
    a: WeightSource, b: WeightSource, progress: Progress | None = None
) -> Iterator[str]:
    """Every difference in configuration, names, dtypes, shapes and values, one line each.

    Values must be equal bit by bit, or as a Megatron checkpoint among the two keeps them; one
    tensor of each is in memory at a time. Nothing is yielded for equal checkpoints. Opening them
    has shown that their files hold the tensors of their descriptions and no others.

    Raises:
        ValueError: naming the file: weights that are damaged, NaN or infinite.
    """
    described = dict.fromkeys(field.name for x in (a, b) for field in fields(x.model))
    for name in described:
        ours, theirs = (getattr(x.model, name, None) for x in (a, b))
        if ours != theirs and name not in _FREE:
            yield f"configuration: {name} is {ours!r} and {theirs!r}"
    pairs = (a, b), (a.carried, b.carried)
    yield from (
        f"{name}: only in {source.path}"
        for ours, theirs in pairs
        for source, one, other in ((a, ours, theirs), (b, theirs, ours))
        for name in one.shapes
        if name not in other.shapes
    )
    # Megatron-Core keeps some in a dtype of its own, whatever a folder has them in.
    kept = {n for n, x in a.model.weight_table().hf_dtypes(torch.float64).items() if x.itemsize < 8}
    shifts = a.model.weight_table().shifts()
    if isinstance(a, HfFolder) and isinstance(b, HfFolder):
        shifts = {}
    total, done = sum(len(ours.shapes) for ours, _ in pairs), 0
    for ours, theirs in pairs:
        for name in ours.shapes:
            if name in theirs.shapes:
                yield from _compare(name, ours, theirs, name in kept, shifts.get(name, 0.0))
            done += 1
            if progress:
                progress(done, total)


def _compare(
    name: str,
    a: WeightSource | CarriedTensors,
    b: WeightSource | CarriedTensors,
    may_differ_in_dtype: bool,
    shift: float,
) -> Iterator[str]:
    if a.dtypes[name] != b.dtypes[name] and not may_differ_in_dtype:
        yield f"{name}: dtype {a.dtypes[name]} and {b.dtypes[name]}"
    if a.shapes[name] != b.shapes[name]:
        yield f"{name}: shape {list(a.shapes[name])} and {list(b.shapes[name])}"
    else:
        left, right = a.read(name), b.read(name)
        if shift:
            left, right = (shifted(x, shift).to(x.dtype) for x in (left, right))
        yield from _values(name, left, right)


def compare_training_state(a: MegatronFolder, b: MegatronFolder) -> Iterator[str]:
    """Differences between the optimizer tensors of two torch_dist checkpoints of any layout.

    Rows that pad the vocabulary are not compared. The optimizer state of a legacy checkpoint is not
    read: with one of them nothing is compared and nothing is yielded.
    """
    if not (is_torch_dist(a.path) and is_torch_dist(b.path)):
        return
    left, right = TorchDistReader(a.path), TorchDistReader(b.path)
    ours, theirs = (set(filter(is_optimizer_state, reader.tensors)) for reader in (left, right))
    yield from (f"{key}: only in {a.path}" for key in sorted(ours - theirs))
    yield from (f"{key}: only in {b.path}" for key in sorted(theirs - ours))
    for key in sorted(ours & theirs):
        x, y = left.tensors[key], right.tensors[key]
        rows = a.model.vocab_size if is_vocabulary(key) else None
        if x.dtype != y.dtype:
            yield f"{key}: dtype {x.dtype} and {y.dtype}"
        if x.shape != y.shape and (rows is None or x.shape[1:] != y.shape[1:]):
            yield f"{key}: shape {list(x.shape)} and {list(y.shape)}"
        else:
            yield from _values(key, left.read(key)[:rows], right.read(key)[:rows])


def _values(name: str, a: Tensor, b: Tensor) -> Iterator[str]:
    # A zero and a negative zero are not the same bits.
    different = (a.to(b.dtype) != b) | (a.signbit() != b.signbit())
    if different.any():
        largest = (a.double() - b.double()).abs().max().item()
        yield (
            f"{name}: {int(different.sum())} of {a.numel()} values differ, by at most {largest:.3e}"
        )


@dataclass(frozen=True)
class LogitComparison:
    """How far apart two models are on the same tokens, in fp32.

    Attributes:
        largest_difference: between logits, relative to the largest logit.
        kl: mean divergence of b's next-token distribution from a's, in nats.
        first_layer: number of the first layer whose output differs by more than ``bound``
            (relative); None if none does.
        same_continuation: whether both continue greedily with the same tokens.
        bound: below which outputs count as equal.
    """

    largest_difference: float
    kl: float
    first_layer: int | None
    same_continuation: bool
    bound: float

    @property
    def equal(self) -> bool:
        """Whether the models agree within ``bound`` and continue alike."""
        return self.largest_difference <= self.bound and self.same_continuation

    def __str__(self) -> str:
        layer = (
            "no layer differs" if self.first_layer is None else f"layer {self.first_layer} first"
        )
        return (
            f"logits differ by {self.largest_difference:.2e} (relative), KL {self.kl:.2e} nats, "
            f"{layer}, greedy continuation {'equal' if self.same_continuation else 'different'}"
        )


def compare_logits(
    a: WeightSource,
    b: WeightSource,
    num_tokens: int = 32,
    seed: int = 0,
    num_greedy: int = 8,
    bound: float = 1e-4,
) -> LogitComparison:
    """Run both models in fp32 on the same random tokens, one after the other.

    Args:
        a: a Hugging Face folder (run by ``transformers``) or a Megatron checkpoint (by
            ``GPTModel`` with the prefix-grouped spec, on one process).
        b: as a.
        num_tokens: length of the random sequence.
        seed: of the random sequence.
        num_greedy: tokens to continue it by.
        bound: largest relative difference that rounding may explain.

    Raises:
        ValueError: if the models have different vocabularies.
    """
    if a.model.vocab_size != b.model.vocab_size:
        raise ValueError(
            f"vocab_size {a.model.vocab_size} of {a.path} and {b.model.vocab_size} of {b.path}: "
            "logits of different vocabularies cannot be compared"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, a.model.vocab_size, (num_tokens,), generator=generator)
    left, right = (_run(source, tokens, num_greedy) for source in (a, b))
    layers = [_difference(x, y) > bound for x, y in zip(left[1], right[1])]
    # In fp32 the rounding of equal models would be some -1e-8.
    p, q = (logits.double().log_softmax(-1) for logits in (left[0], right[0]))
    return LogitComparison(
        largest_difference=_difference(left[0], right[0]),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        first_layer=layers.index(True) if True in layers else None,
        same_continuation=left[2] == right[2],
        bound=bound,
    )


def _run(
    source: WeightSource, tokens: Tensor, num_greedy: int
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Logits ``[L, vocab_size]``, every layer's output ``[L, hidden]``, greedy tokens."""
    run = _transformers if isinstance(source, HfFolder) else _megatron
    with torch.no_grad(), run(source) as (forward, layers):
        outputs: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs.append(hidden.reshape(len(tokens), -1).clone())

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        logits = forward(tokens)
        for hook in hooks:
            hook.remove()
        continued = tokens
        for _ in range(num_greedy):
            continued = torch.cat([continued, forward(continued)[-1].argmax()[None]])
        return logits, outputs, continued[len(tokens) :].tolist()


@contextmanager
def _transformers(source: WeightSource) -> Iterator[tuple[Forward, Any]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    model.eval()
    yield lambda tokens: model(tokens[None]).logits[0], model.model.layers


@contextmanager
def _megatron(source: WeightSource) -> Iterator[tuple[Forward, Any]]:
    with one_rank() as device:
        model = build_gpt(source.model, torch.float32, device)
        load_weights([model], source)

        def forward(tokens: Tensor) -> Tensor:
            n = len(tokens)
            mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=device), 1)[None, None]
            ids = torch.arange(n, device=device)[None]
            logits: Tensor = model(tokens[None].to(device), ids, mask)[0]
            return logits.cpu()

        yield forward, model.decoder.layers


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
