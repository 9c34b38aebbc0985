"""What a backend is: a complete tree attention that says what it can take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernel_passes import KernelPasses, VarlenKernel
from ..kinds import PLAIN_ATTENTION, AttentionKind
from ..merge import LseMergeAttention
from ..plan import AttentionPlan
from ..resident import ResidentKV


@dataclass(frozen=True)
class AttentionInputs:
    """What decides whether a backend can run: device, dtype, head sizes and kind."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    kind: AttentionKind = PLAIN_ATTENTION

    def __post_init__(self) -> None:
        """Refuse heads that no attention has."""
        if min(self.head_dim, self.num_heads, self.num_kv_heads) < 1 or (
            self.num_heads % self.num_kv_heads
        ):
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}, none of them 0, and head_dim={self.head_dim} at least 1"
            )

    @property
    def value_dim(self) -> int:
        """Head size of the values."""
        return self.head_dim if self.kind.value_dim is None else self.kind.value_dim

    @classmethod
    def of(cls, q: Tensor, k: Tensor, kind: AttentionKind = PLAIN_ATTENTION) -> AttentionInputs:
        """Describe ``q [T, Hq, D]`` and ``k [T, Hkv, D]``."""
        return cls(q.device, q.dtype, q.shape[2], q.shape[1], k.shape[1], kind)


class AttentionBackend(ABC):
    """Attention of every sample over its own path, differentiable in q, k, v.

    Attributes:
        name: in the registry.
        device_type: of the tensors that it takes; any when None.
        dtypes: that it takes; any when None.
        features: of ``AttentionKind``, that it computes beyond plain attention.
        merges: whether it merges passes, by what ``merge_implementation`` names.
    """

    name: str
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    features: frozenset[str] = frozenset()
    merges = False

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        if self.device_type not in (None, inputs.device.type):
            return f"needs tensors on {self.device_type}, got {inputs.device}"
        if self.dtypes is not None and inputs.dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, got {inputs.dtype}"
        wanted = inputs.kind.features(inputs.head_dim)
        unknown = [words for feature, words in wanted if feature not in self.features]
        return f"does not compute {' or '.join(unknown)}" if unknown else None

    def kernels(self) -> str | None:
        """Which kernels run under the name, where that is not always the same."""
        return None

    @abstractmethod
    def prepare(self, plan: AttentionPlan, device: torch.device) -> Any:
        """What the calls on one row share, made once: it is kept with the row's layout.

        It must not refer to the layout (see ``PackedLayout.derived``).
        """

    @abstractmethod
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: Any,
        kind: AttentionKind,
        sink: Tensor | None = None,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """``[T, Hq, Dv]`` output; the backward pass adds to the gradients of ``resident``.

        Args:
            q: queries, as in ``prefix_grouped_attention``.
            k: keys.
            v: values.
            prepared: what ``prepare`` made of the row's plan for the window of ``kind``.
            kind: that the backend does not refuse.
            sink: ``[Hq]``, exactly when ``kind.has_sink``.
            resident: kept keys and values by prefix row.
        """


class MergingBackend(AttentionBackend, VarlenKernel):
    """A backend that is a varlen kernel, run pass by pass and merged."""

    features = frozenset({"has_sink", "value_dim"})
    merges = True

    def takes_value_dim(self, head_dim: int, value_dim: int) -> bool:
        """See ``VarlenKernel``: none, unless a backend says otherwise."""
        return False

    def prepare(self, plan: AttentionPlan, device: torch.device) -> KernelPasses:
        """The passes with the kernel's arguments."""
        return KernelPasses.of(plan, self, device)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: KernelPasses,
        kind: AttentionKind,
        sink: Tensor | None = None,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """See ``AttentionBackend``."""
        scores = kind.scores(q.shape[2])
        out: Tensor = LseMergeAttention.apply(q, k, v, sink, prepared, self, scores, resident)
        return out
