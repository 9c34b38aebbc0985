"""Legacy checkpoints: one pickled ``model_optim_rng.pt`` per tensor and pipeline rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..table import FUSED_NORMS, RENAMED
from .contents import is_empty, is_extra_state, loose_tensors
from .torch_files import load_torch_file, named_entries

_CHUNK = re.compile(r"model\d*")
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")


class LegacyShards:
    """Tensor-parallel shards by local-spec name, layers numbered over the whole model.

    One pipeline stage is in memory at a time.

    Raises:
        ValueError: naming the file: not trusted, missing ranks, damaged files.
        NotImplementedError: expert-parallel checkpoints.
    """

    def __init__(self, folder: Path, *, trust_pickle: bool) -> None:
        self._files: dict[tuple[int, int], Path] = {}
        self._trust = trust_pickle
        for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
            match = _RANK.fullmatch(path.parent.name)
            if not match:
                raise ValueError(f"{path.parent}: not a rank's folder name")
            if match[3]:
                raise NotImplementedError(
                    f"{path}: legacy expert-parallel checkpoints are not read; save as torch_dist"
                )
            self._files[int(match[1]), int(match[2] or 0)] = path
        if not self._files:
            raise ValueError(
                f"{folder}: neither torch_dist (metadata.json) nor legacy (mp_rank_00/"
                "model_optim_rng.pt); is this the right folder?"
            )
        self.tp_size = max(tp for tp, _ in self._files) + 1
        self.pp_size = max(pp for _, pp in self._files) + 1
        for tp in range(self.tp_size):
            for pp in range(self.pp_size):
                if (tp, pp) not in self._files:
                    raise ValueError(f"{folder}: the file of rank tp={tp}, pp={pp} is missing")
        self._where: dict[str, tuple[int, str, str]] = {}
        self._loaded: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        # What is not empty and no parameter: scales of fp8 layers, copies of weights.
        self._states: list[str] = []
        self._find()

    def _find(self) -> None:
        """Name every parameter globally; chunks and stages follow each other by layer."""
        chunks: list[tuple[int, int, str, dict[str, Any]]] = []
        for pp in range(self.pp_size):
            state = self._stage(pp)[0]
            keys = [key for key in state if _CHUNK.fullmatch(key)]
            if not keys:
                raise ValueError(f"{self._files[0, pp]}: holds no model")
            for key in keys:
                self._check_ranks(pp, key)
                chunks.append((int(key[5:] or 0), pp, key, state[key]))
            for rank in self._stage(pp):
                others = {k: v for k, v in rank.items() if k not in keys}
                self._states += loose_tensors(others)
            if pp == 0:
                self.common = {k: v for k, v in state.items() if k not in keys}
        # model0 of every stage comes before model1 of any.
        offset = 0
        for _, pp, key, state in sorted(chunks, key=lambda chunk: chunk[:2]):
            layers = set()
            for name, value in state.items():
                if not _is_parameter(name, value):
                    continue
                match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
                known = name
                if match:
                    layers.add(int(match[1]))
                    leaf = (FUSED_NORMS | RENAMED).get(match[2], match[2])
                    known = f"decoder.layers.{offset + int(match[1])}.{leaf}"
                if known in self._where:
                    raise ValueError(
                        f"{self._files[0, pp]}: {key} holds {name}, which is {known}, a second time"
                    )
                self._where[known] = (pp, key, name)
                self._shapes[known], self._dtypes[known] = tuple(value.shape), value.dtype
            offset += len(layers)

    def _check_ranks(self, pp: int, key: str) -> None:
        """Every tensor-parallel rank holds the tensors of the first, in its shapes and dtypes."""
        ranks: list[dict[str, Any]] = []
        for tp, state in enumerate(self._stage(pp)):
            ranks.append({})
            for name, value in state.get(key, {}).items():
                if _is_parameter(name, value):
                    ranks[tp][name] = (value.shape, value.dtype)
                elif not is_empty(value):
                    self._states.append(f"{key}.{name}")
        for tp, found in enumerate(ranks):
            names = found.keys() | ranks[0].keys()
            odd = sorted(k for k in names if found.get(k) != ranks[0].get(k))
            if odd:
                raise ValueError(
                    f"{self._files[tp, pp]}: {key}: {odd[0]} is not as on tensor-parallel rank 0; "
                    "the files are damaged or of different models"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor-parallel rank's shard (all are equal)."""
        self._need(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a parameter is stored."""
        self._need(name)
        return self._dtypes[name]

    def read(self, name: str) -> list[Tensor]:
        """The shards of every tensor-parallel rank."""
        self._need(name)
        pp, key, local = self._where[name]
        return [state[key][local] for state in self._stage(pp)]

    def file(self, name: str) -> Path:
        """The file that holds the first tensor-parallel rank's shard."""
        self._need(name)
        return self._files[0, self._where[name][0]]

    def unread(self, names: Sequence[str]) -> list[str]:
        """What of the model lies beside the parameters ``names``."""
        return [*sorted(self._where.keys() - set(names)), *self._states]

    def _need(self, name: str) -> None:
        if name not in self._where:
            raise ValueError(f"{self._files[0, 0].parent.parent}: tensor {name} is missing")

    def _stage(self, pp: int) -> list[dict[str, Any]]:
        if self._loaded[0] != pp:
            self._loaded = (-1, [])
            files = [self._files[tp, pp] for tp in range(self.tp_size)]
            self._loaded = pp, [self._load(file) for file in files]
        return self._loaded[1]

    def _load(self, file: Path) -> dict[str, Any]:
        state = named_entries(load_torch_file(file, trust_pickle=self._trust), file)
        chunks = {k: named_entries(v, file) for k, v in state.items() if _CHUNK.fullmatch(k)}
        return state | chunks


def _is_parameter(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and not is_extra_state(f".{name}")
