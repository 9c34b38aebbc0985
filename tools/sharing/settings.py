"""How a step would be run, and what keeps it from being run like that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_pg.data import row_budget
from megatron_pg.parallel import ParallelSizes
from tools.cli import in_flags
from tools.sharing.dims import ModelDims


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the step would be run.

    Attributes:
        sizes: the parallel layout.
        max_tokens: budget of a row; the recommended one when None.
        min_shared: share every run of at least that many tokens; None shares the prompt.
        bytes_per_value: of activations, 2 for bf16.
        activation_gib: memory of one rank for activations, when known.
        card: key of ``CARDS`` that seconds are predicted for.
        replays_routes: whether recorded routes are replayed (``algorithm.router_replay=R3``), so
            that samples share only tokens whose routes agree.
    """

    sizes: ParallelSizes = ParallelSizes()
    max_tokens: int | None = None
    min_shared: int | None = None
    bytes_per_value: int = 2
    activation_gib: float | None = None
    card: str = "h100"
    replays_routes: bool = False


def setting_problems(settings: Settings, dims: ModelDims | None = None) -> list[str]:
    """Everything that is wrong with the values, and with them for the model where it is known."""
    problems = [*settings.sizes.problems(), *_value_problems(settings)]
    if dims is not None:
        problems += settings.sizes.model_problems(dims.sizes)
    return [in_flags(problem) for problem in problems]


def raise_problems(problems: Sequence[str]) -> None:
    """Raises: ValueError that lists all of ``problems``, unless there are none."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problem(s) with the settings:\n{listed}")


def _value_problems(settings: Settings) -> Iterator[str]:
    for name in ("min_shared", "bytes_per_value"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            yield f"{name}={value} must be at least 1; raise it or leave it out"
    gib = settings.activation_gib
    if gib is not None and not 0 < gib < float("inf"):
        yield f"activation_gib={gib} must be finite and above 0; leave it out when unknown"
    if settings.max_tokens is not None:
        try:
            row_budget(settings.max_tokens, max(settings.sizes.row_multiple, 1))
        except ValueError as error:
            yield str(error)
