"""Which items go together and in which order, by their lengths and costs."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace


def fill_bins(lens: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit decreasing: each item into the fullest bin with room, else into a new one."""
    bins: list[list[int]] = []
    by_free: list[tuple[int, int]] = []
    for item in sorted(range(len(lens)), key=lambda i: (-lens[i], i)):
        at = bisect_left(by_free, (lens[item], -1))
        free, place = by_free.pop(at) if at < len(by_free) else (budget, len(bins))
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        insort(by_free, (free - lens[item], place))
    return bins


def level_bins(
    bins: list[list[int]], lens: Sequence[int], costs: Sequence[float], budget: int
) -> list[list[int]]:
    """As many bins with a lower greatest cost, or ``bins`` where the budget leaves no room.

    Each item, the dearest first, goes to the cheapest bin with room for it.
    """
    level: list[list[int]] = [[] for _ in bins]
    free = [budget] * len(bins)
    heap = [(0.0, place) for place in range(len(bins))]
    shortest = min(lens, default=0)
    for item in sorted(range(len(lens)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and free[heap[0][1]] < lens[item]:
            full.append(heappop(heap))
        if not heap:
            return bins
        cost, place = heap[0]
        level[place].append(item)
        free[place] -= lens[item]
        heapreplace(heap, (cost + costs[item], place))
        for entry in full:
            if free[entry[1]] >= shortest:
                heappush(heap, entry)

    def greatest(filled: list[list[int]]) -> float:
        return max((sum(costs[i] for i in members) for members in filled), default=0.0)

    return level if greatest(level) < greatest(bins) else bins


def rise_and_fall(costs: Sequence[float]) -> list[int]:
    """Every item once: from the cheapest to the dearest by every second one, and back."""
    ranked = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    return ranked[::2] + ranked[1::2][::-1]
