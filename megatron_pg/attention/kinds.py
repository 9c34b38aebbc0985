"""Kinds of attention: what a layer computes beyond causal softmax over a path."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Scores(NamedTuple):
    """How a product of query and key becomes a score: ``scale * (q . k)``, bounded by softcap."""

    scale: float
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """What attention of a layer computes; the default is plain softmax attention.

    A query at logical position p sees the keys of its path at positions ``p - window`` to p. Its
    scores are ``s = scale * (q . k)``, or ``softcap * tanh(s / softcap)``; their weights are
    ``exp(s) / (exp(sink) + sum(exp(s)))``, without the first term where there is no sink.

    Attributes:
        softmax_scale: factor on the products; ``head_dim ** -0.5`` when None.
        window: keys that a query sees before itself; None sees all.
        has_sink: whether the call is given a logit per head that takes weight and has no value.
        softcap: bound on the size of scores; None bounds none.
        value_dim: head size of values and output; that of queries and keys when None.

    Raises:
        ValueError: on a number that no attention can have.
    """

    softmax_scale: float | None = None
    window: int | None = None
    has_sink: bool = False
    softcap: float | None = None
    value_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("softmax_scale", "softcap"):
            _check_factor(name, getattr(self, name))
        for name, least in (("window", 0), ("value_dim", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")

    def scale(self, head_dim: int) -> float:
        """Factor on the products of heads of this size."""
        return head_dim**-0.5 if self.softmax_scale is None else float(self.softmax_scale)

    def scores(self, head_dim: int) -> Scores:
        """What kernels need to score pairs of queries and keys of this size."""
        return Scores(self.scale(head_dim), self.softcap)

    def features(self, head_dim: int) -> Iterator[tuple[str, str]]:
        """Fields in which it differs from plain attention of ``head_dim``, and how to say it."""
        if self.window is not None:
            yield "window", f"a window (window={self.window})"
        if self.has_sink:
            yield "has_sink", "a sink (has_sink=True)"
        if self.softcap is not None:
            yield "softcap", f"a bound on scores (softcap={self.softcap})"
        if self.value_dim not in (None, head_dim):
            yield "value_dim", f"values of another size (value_dim={self.value_dim})"


def _check_factor(name: str, value: Any) -> None:
    """Kernels mask before they scale, so a factor of 0 or below would show hidden keys."""
    if value is None:
        return
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be finite and above 0")


PLAIN_ATTENTION = AttentionKind()
