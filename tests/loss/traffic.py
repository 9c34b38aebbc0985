"""Counts what goes through memory and what lives there."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts passes over logits, and the bytes of whatever is created within it and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = self.peak_bytes = 0
        self.logits: set[int] = set()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def is_logits(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.logits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.passes += sum(map(self.is_logits, inputs))
        for storage in (x.untyped_storage() for x in outputs):
            if any(storage._cdata == x.untyped_storage()._cdata for x in inputs):
                continue
            self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.storages = {key: x for key, x in self.storages.items() if not x[0].expired()}
        self.logits &= set(self.storages)
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.storages.values()))
        return out


class Launches:
    """In a kernel's place: remembers that it was launched, and computes nothing."""

    def __init__(self, traffic: Traffic, passes: int) -> None:
        self.traffic, self.passes = traffic, passes

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, logits: Tensor, *args: object, **kwargs: object) -> None:
        assert self.traffic.is_logits(logits)
        self.traffic.passes += self.passes
