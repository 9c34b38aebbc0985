"""How a step would be run, and what keeps it from being run like that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_pg.data.plan import row_budget
from tools.sharing.model import ModelDims


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the step would be run.

    Attributes:
        tp, pp: parallel sizes; tp is with sequence parallelism.
        cp: context parallelism; the plugin refuses all but 1.
        max_tokens: budget of a row; the recommended one when None.
        min_shared: share every run of at least that many tokens; None shares the prompt.
        bytes_per_value: of activations, 2 for bf16.
        activation_gib: memory of one rank for activations, when known.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    max_tokens: int | None = None
    min_shared: int | None = None
    bytes_per_value: int = 2
    activation_gib: float | None = None


def setting_problems(settings: Settings, dims: ModelDims | None = None) -> list[str]:
    """Everything that is wrong with the values, and with them for the model where it is known."""
    problems = list(_value_problems(settings))
    if dims is not None:
        problems += _layout_problems(settings, dims)
    return problems


def raise_problems(problems: Sequence[str]) -> None:
    """Raises: ValueError that lists all of ``problems``, unless there are none."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problem(s) with the settings:\n{listed}")


def _value_problems(settings: Settings) -> Iterator[str]:
    for name in ("tp", "pp", "cp", "min_shared", "bytes_per_value"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            yield f"{name}={value} must be at least 1; raise it or leave it out"
    if settings.cp > 1:
        yield (
            f"cp={settings.cp}: context parallelism is refused, packed rows are not split over "
            "context-parallel ranks; set cp=1 and use tp with sequence parallelism, or resident "
            "prefixes (run.prefix_resident=auto) for samples that are longer than a row"
        )
    gib = settings.activation_gib
    if gib is not None and not 0 < gib < float("inf"):
        yield f"activation_gib={gib} must be finite and above 0; leave it out when unknown"
    if settings.max_tokens is not None:
        try:
            row_budget(settings.max_tokens, max(settings.tp, 1))
        except ValueError as error:
            yield str(error)


def _layout_problems(settings: Settings, dims: ModelDims) -> Iterator[str]:
    """What Megatron refuses too."""
    tp, pp, groups = settings.tp, settings.pp, dims.num_query_groups
    tp_divides = {"num_attention_heads": dims.num_attention_heads, **dims.mlp_widths}
    for axis, size, values in (("tp", tp, tp_divides), ("pp", pp, {"num_layers": dims.num_layers})):
        for name, value in values.items():
            if size > 0 and value % size:
                yield f"{name}={value} is no multiple of {axis}={size}; choose one that divides it"
    if tp > 0 and groups % tp and tp % groups:
        yield (
            f"num_query_groups={groups} neither divides nor is a multiple of tp={tp}; choose a tp "
            "that fits"
        )
