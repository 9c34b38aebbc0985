"""Whether two checkpoints of either kind hold the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from torch import Tensor

from .contents import is_optimizer_state
from .convert import Progress
from .megatron_folder import MegatronFolder, WeightSource
from .reshard import is_vocabulary
from .torch_dist import TorchDistReader, is_torch_dist

# Fields of the description that the weights do not depend on.
_FREE = {"architecture", "dtype", "max_sequence_length"}


def compare_weights(
    a: WeightSource, b: WeightSource, progress: Progress | None = None
) -> Iterator[str]:
    """Every difference in configuration, names, dtypes, shapes and values, one line each.

    Values must be equal bit by bit; one tensor of each is in memory at a time. Nothing is
    yielded for equal checkpoints. Opening them has shown that their files hold the tensors of
    their descriptions and no others.

    Raises:
        ValueError: naming the file: weights that are damaged, NaN or infinite.
    """
    for field in fields(a.model):
        ours, theirs = getattr(a.model, field.name), getattr(b.model, field.name)
        if ours != theirs and field.name not in _FREE:
            yield f"configuration: {field.name} is {ours!r} and {theirs!r}"
    for name in a.shapes:
        if name not in b.shapes:
            yield f"{name}: only in {a.path}"
    for name in b.shapes:
        if name not in a.shapes:
            yield f"{name}: only in {b.path}"
    for done, name in enumerate(a.shapes, 1):
        if name in b.shapes:
            if a.dtypes[name] != b.dtypes[name]:
                yield f"{name}: dtype {a.dtypes[name]} and {b.dtypes[name]}"
            if a.shapes[name] != b.shapes[name]:
                yield f"{name}: shape {list(a.shapes[name])} and {list(b.shapes[name])}"
            else:
                yield from _values(name, a.read(name), b.read(name))
        if progress:
            progress(done, len(a.shapes))


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
