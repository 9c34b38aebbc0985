"""Whether every rank fits its card, and what would make it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...data import CARDS
from ...parallel import MEGATRON_NAMES
from .memory import RunMemory

_GIB = 2**30
_CARDS_OF_A_HOST = 8
_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of the fullest rank.

    Attributes:
        card: its name.
        capacity: bytes of it that a run can have.
        needed: bytes.
        remedies: changes to the configuration, each of which would make it fit.
    """

    card: str
    capacity: int
    needed: int
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.capacity

    def __str__(self) -> str:
        """For a person."""
        sizes = f"{self.needed / _GIB:.1f} of {self.capacity / _GIB:.1f} GiB"
        if self.fits:
            return f"fits {self.card}: yes, {sizes}"
        remedies = "; or ".join(self.remedies) or "nothing alone; take more ranks for the model"
        return f"fits {self.card}: no, {sizes}. What would fit: {remedies}"


def judge(memory: RunMemory, card: str | None) -> Verdict:
    """Of a run on cards by their key; None for the device here."""
    if card is None:
        name, capacity = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        name, capacity = f"{card} ({CARDS[card].sold_gb} GB)", CARDS[card].capacity_bytes
    verdict = Verdict(card=name, capacity=capacity, needed=memory.fullest.total)
    if verdict.fits:
        return verdict
    return replace(verdict, remedies=tuple(_remedies(memory, capacity)))


def _remedies(memory: RunMemory, capacity: int) -> Iterator[str]:
    """The least recompute that fits, sizes that do, one with the other, the longest row that does.

    Sizes with everything recomputed only where neither does alone.
    """
    again = list(_recomputes(memory))
    found = [*_first_that_fits(again, capacity)]
    for options in _larger(memory):
        found += _first_that_fits(options, capacity)
    label, whole = again[-1]
    for options in _larger(whole) if whole is not None and not found else ():
        found += [f"{label} {size}" for size in _first_that_fits(options, capacity)]
    yield from found
    tokens = _longest_row(memory, capacity)
    if tokens:
        yield f"prefix_group.max_tokens_per_microbatch={tokens}"


def _first_that_fits(
    options: Iterable[tuple[str, RunMemory | None]], capacity: int
) -> Iterator[str]:
    for label, memory in options:
        if memory is not None and memory.fits(capacity):
            yield label
            return


def _recomputes(memory: RunMemory) -> Iterator[tuple[str, RunMemory | None]]:
    """More of it than the run asks for, the least first and all last."""
    config, asked = memory.plan.config, memory.config.model.transformer
    modules = set(config.recompute_modules or ()) if config.recompute_granularity else set()
    more = sorted(modules | {"moe" if config.num_moe_experts else "mlp"})
    choices: list[dict[str, Any]] = [_FULL]
    if config.recompute_granularity != "full" and set(more) != modules:
        choices.insert(0, {"recompute_granularity": "selective", "recompute_modules": more})
    for choice in choices:
        kept = {n: value for n, value in asked.items() if not n.startswith("recompute_")}
        model = replace(memory.config.model, transformer=kept | choice)
        yield _overrides("model.transformer", choice), memory.changed(model=model)


def _larger(memory: RunMemory) -> Iterator[Iterator[tuple[str, RunMemory | None]]]:
    """The optimizer's state divided; then every size doubled, until it is enough."""
    parallel = memory.config.parallel
    divided = {} if parallel.use_distributed_optimizer else {"use_distributed_optimizer": True}
    if divided:
        yield _laid(memory, [divided])
    for name in ("tp", "cp", "pp", "ep"):
        sizes = [getattr(parallel.sizes, name) * factor for factor in (2, 4, 8)]
        if name == "tp":
            sizes = [size for size in sizes if size <= _CARDS_OF_A_HOST]
        # Ranks that divide heads divide the tokens between, too.
        more = divided | ({"sequence_parallel": True} if name == "tp" else {})
        yield _laid(memory, [{MEGATRON_NAMES[name]: size} | more for size in sizes])


def _laid(
    memory: RunMemory, choices: Iterable[dict[str, Any]]
) -> Iterator[tuple[str, RunMemory | None]]:
    for choice in choices:
        parallel = replace(memory.config.parallel, **choice)
        yield _overrides("parallel", choice), memory.changed(parallel=parallel)


def _longest_row(memory: RunMemory, capacity: int) -> int:
    """Tokens of the longest row that fits; 0 without, or where the run needs longer ones."""
    multiple = memory.sizes.row_multiple
    fit, others = 0, memory.rows.tokens // multiple
    while others - fit > 1:
        middle = (fit + others) // 2
        rows = replace(memory.rows, tokens=middle * multiple)
        if replace(memory, rows=rows).fullest.total <= capacity:
            fit = middle
        else:
            others = middle
    settings = replace(memory.config.prefix_group, max_tokens_per_microbatch=fit * multiple)
    shorter = memory.changed(prefix_group=settings) if fit else None
    return fit * multiple if shorter is not None and shorter.fits(capacity) else 0


def _overrides(section: str, values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(value)}]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"{section}.{name}={text(value)}" for name, value in values.items())
