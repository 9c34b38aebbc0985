"""Legacy checkpoints: one pickled ``model_optim_rng.pt`` per tensor and pipeline rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .layout import load_torch_file
from .mapping import FUSED_NORMS

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
        self._find()

    def _find(self) -> None:
        """Name every parameter globally; chunks and stages follow each other by layer."""
        chunks: list[tuple[int, str, dict[str, Tensor]]] = []
        for pp in range(self.pp_size):
            state = self._stage(pp)[0]
            keys = sorted((k for k in state if re.fullmatch(r"model\d*", k)), key=lambda k: k[5:])
            if not keys:
                raise ValueError(f"{self._files[0, pp]}: holds no model")
            chunks += [(pp, key, state[key]) for key in keys]
            if pp == 0:
                self.common = {k: v for k, v in state.items() if not k.startswith("model")}
        # model0 of every stage comes before model1 of any.
        offset = 0
        for pp, key, state in sorted(chunks, key=lambda chunk: (chunk[1][5:] or "0", chunk[0])):
            layers = set()
            for name, tensor in state.items():
                if not isinstance(tensor, Tensor) or name.endswith("_extra_state"):
                    continue
                match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
                known = name
                if match:
                    layers.add(int(match[1]))
                    leaf = FUSED_NORMS.get(match[2], match[2])
                    known = f"decoder.layers.{offset + int(match[1])}.{leaf}"
                self._where[known] = (pp, key, name)
                self._shapes[known] = tuple(tensor.shape)
                self.dtype = tensor.dtype
            offset += len(layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor-parallel rank's shard (all are equal)."""
        self._need(name)
        return self._shapes[name]

    def read(self, name: str) -> list[Tensor]:
        """The shards of every tensor-parallel rank."""
        self._need(name)
        pp, key, local = self._where[name]
        shards = []
        for tp, state in enumerate(self._stage(pp)):
            if local not in state.get(key, {}):
                raise ValueError(f"{self._files[tp, pp]}: tensor {local} is missing")
            shards.append(state[key][local])
        return shards

    def _need(self, name: str) -> None:
        if name not in self._where:
            raise ValueError(f"{self._files[0, 0].parent.parent}: tensor {name} is missing")

    def _stage(self, pp: int) -> list[dict[str, Any]]:
        if self._loaded[0] != pp:
            self._loaded = (-1, [])
            files = [self._files[tp, pp] for tp in range(self.tp_size)]
            states = [load_torch_file(file, trust_pickle=self._trust) for file in files]
            self._loaded = pp, states
        return self._loaded[1]
