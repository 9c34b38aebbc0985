"""What a function did on a device: kernels, copies, waits, collectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Copy:
    """Bytes that go to the device or come from it.

    Attributes:
        operator: that copied them.
        num_bytes: how many.
        is_to_device: which way they go.
        is_pinned: whether the host's pages stay where they are, so that it need not take part.
        waits: whether the host waits until they have arrived.
        place: of the call, innermost line first.
    """

    operator: str
    num_bytes: int
    is_to_device: bool
    is_pinned: bool
    waits: bool
    place: str


@dataclass(frozen=True)
class Sync:
    """Something for which the host waits until the device has come to it, and where."""

    what: str
    place: str


@dataclass(frozen=True)
class Collective:
    """What the ranks of a group do together.

    Attributes:
        name: of the operation, ``send`` and ``recv`` included.
        group: as Megatron-Core describes it.
        num_ranks: of the group.
        shape, dtype: of what this rank gives, or gets where it gives nothing.
        place: of the call, innermost line first.
    """

    name: str
    group: str
    num_ranks: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str


@dataclass(frozen=True)
class Record:
    """What was done, each kind in order.

    Attributes:
        kernels: names of operators, of Triton kernels (``triton.NAME``), of what PyTorch compiles
            (``compiled.NAME``) and of packages' kernels. A library's attention or matrix product
            is one, and so is what PyTorch composes below its dispatcher.
        copies: between host and device.
        syncs: of the host with the device, those for copies included.
        collectives: of all groups, those of one rank included.
    """

    kernels: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """How often each kernel ran."""
        return Counter(self.kernels)

    @property
    def pageable(self) -> list[Copy]:
        """Copies to the device that the host has to take part in."""
        return [copy for copy in self.copies if copy.is_to_device and not copy.is_pinned]
