"""How many tokens the rows of a step hold, and of which kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..data import PackPlan, part_tokens


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Size of the rows of all data-parallel ranks.

    Attributes:
        unique: tokens encoded.
        logical: tokens of the written-out samples.
        padded: padding at the end of rows.
        rows: microbatches, prefix rows and fillers included.
        fillers: rows that contribute nothing; their tokens are not counted.
        resident: tokens of resident prefixes, counted in ``unique`` too.
        resident_groups: groups whose prefix is resident.
        repeated_groups: groups that are divided and repeat their prefix.
        waves: of one rank.
        split: tokens that stand once more since samples route them to other experts.
    """

    unique: int = 0
    logical: int = 0
    padded: int = 0
    rows: int = 0
    fillers: int = 0
    resident: int = 0
    resident_groups: int = 0
    repeated_groups: int = 0
    waves: int = 0
    split: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        both = ((f.name, getattr(self, f.name) + getattr(other, f.name)) for f in fields(self))
        return TokenCounts(**dict(both))


def count_tokens(waves: Sequence[PackPlan]) -> TokenCounts:
    """Tokens of one rank's waves, fillers' left out."""
    total = TokenCounts(waves=len(waves))
    places: dict[int, int] = {}
    for wave in waves:
        for row in wave.rows:
            unique = sum(part_tokens(wave.shapes, part) for part in row)
            total += _row_counts(unique, wave, bool(row))
            for part in row:
                shape = wave.shapes[part.group]
                logical = int(shape.tree.sample_lens[list(part.samples)].sum())
                split = 0 if part.group in places else shape.split_tokens
                total += TokenCounts(logical=logical, split=split)
                places[part.group] = places.get(part.group, 0) + (not part.is_resident)
        for prefix_row in wave.prefix_rows:
            unique = sum(wave.shapes[group].resident_tokens for group in prefix_row)
            total += _row_counts(unique, wave, bool(prefix_row))
            total += TokenCounts(resident=unique, resident_groups=len(prefix_row))
    return total + TokenCounts(repeated_groups=sum(count > 1 for count in places.values()))


def _row_counts(unique: int, wave: PackPlan, is_used: bool) -> TokenCounts:
    return TokenCounts(
        unique=unique, padded=-unique % wave.pad_to_multiple, rows=1, fillers=int(not is_used)
    )
