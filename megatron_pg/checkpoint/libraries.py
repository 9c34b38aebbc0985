"""The same conversions by other libraries' mappings: at tp=1, and resharded afterwards.

Our own table (``convert``) is the default. These hold the whole model in memory, once.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file

from .convert import Progress, hf_to_megatron, megatron_to_hf, write_hf
from .files import read_json, with_dtype, write_json
from .hf_folder import HfFolder
from .hf_parse import read_hf_config
from .hf_writer import MAX_SHARD_BYTES
from .layout import iteration_name, write_hf_metadata_folder, write_tracker
from .mapping import Mapping
from .megatron_args import make_megatron_args
from .megatron_folder import MegatronFolder, WeightSource, common_state
from .model import load_weights
from .one_rank import build_gpt, one_rank
from .reshard import reshard_checkpoint


class WeightLibrary(Protocol):
    """Moves the weights of a whole model, built at tp=1 and pp=1 without padded vocabulary."""

    def load(self, gpt_model: Any, hf_dir: Path, dtype: torch.dtype) -> None:
        """Load a Hugging Face folder into the model."""

    def export(self, gpt_model: Any, hf_dir: Path, out: Path, dtype: torch.dtype) -> None:
        """Write safetensors (and an index) to ``out``; ``hf_dir`` has the configuration."""


class Modelopt:
    """NVIDIA ModelOpt. Above tp=1 its export writes one rank's rows as if they were all."""

    def __init__(self) -> None:
        self._export = _require("modelopt", "modelopt.torch.export", "nvidia-modelopt")

    def load(self, gpt_model: Any, hf_dir: Path, dtype: torch.dtype) -> None:
        """See ``WeightLibrary.load``."""
        self._export.import_mcore_gpt_from_hf(gpt_model, str(hf_dir), dtype=dtype)

    def export(self, gpt_model: Any, hf_dir: Path, out: Path, dtype: torch.dtype) -> None:
        """See ``WeightLibrary.export``."""
        self._export.export_mcore_gpt_to_hf(
            gpt_model, str(hf_dir), dtype=dtype, export_dir=str(out)
        )


class MegatronBridge:
    """Megatron Bridge, which imports only beside Transformer Engine."""

    def __init__(self) -> None:
        self._bridge = _require("megatron-bridge", "megatron.bridge", "megatron-bridge").AutoBridge

    def load(self, gpt_model: Any, hf_dir: Path, dtype: torch.dtype) -> None:
        """See ``WeightLibrary.load``."""
        self._bridge.from_hf_pretrained(str(hf_dir)).load_hf_weights([gpt_model])

    def export(self, gpt_model: Any, hf_dir: Path, out: Path, dtype: torch.dtype) -> None:
        """See ``WeightLibrary.export``."""
        # It takes the names, not the weights, from a folder that has both.
        names = out / "names"
        names.mkdir()
        write_json(names / "config.json", read_json(hf_dir / "config.json"))
        shapes = Mapping(read_hf_config(hf_dir)).hf_shapes()
        index = {"weight_map": dict.fromkeys(shapes, "model.safetensors")}
        write_json(names / "model.safetensors.index.json", index)
        bridge = self._bridge.from_hf_pretrained(str(names))
        tensors = bridge.export_hf_weights([gpt_model], cpu=True, show_progress=False)
        whole = {name: tensor.to(dtype).contiguous() for name, tensor in tensors}
        save_file(whole, out / "model.safetensors", metadata={"format": "pt"})


LIBRARIES: dict[str, Callable[[], WeightLibrary]] = {
    "modelopt": Modelopt,
    "megatron-bridge": MegatronBridge,
}


def open_library(backend: str) -> WeightLibrary:
    """Import a library.

    Raises:
        ValueError: a name that is no library's, or a library that does not import, and why.
    """
    if backend not in LIBRARIES:
        raise ValueError(
            f"backend={backend!r}: use one of {', '.join(LIBRARIES)}, or the direct conversion"
        )
    return LIBRARIES[backend]()


def hf_to_megatron_by(
    backend: str,
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    vpp_size: int | None = None,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Equals ``hf_to_megatron``, with the weights placed by a library of ``LIBRARIES``.

    Raises:
        ValueError: as ``hf_to_megatron`` and ``open_library``; a model that the library cannot
            convert, or weights of several dtypes.
        NotImplementedError: as ``hf_to_megatron``.
    """
    library, out = open_library(backend), Path(out_dir)
    layout: dict[str, Any] = dict(tp_size=tp_size, pp_size=pp_size, vpp_size=vpp_size)
    divisible: dict[str, Any] = dict(make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    target = hf_to_megatron(hf_dir, out, **layout, **divisible, dtype=dtype, dry_run=True)
    if dry_run:
        return target
    source = HfFolder(hf_dir)
    stored = dtype or _only_dtype(source)
    with one_rank() as device, _scratch_folder(out) as scratch:
        gpt_model = build_gpt(source.model, stored, device)
        with torch.no_grad():
            for parameter in gpt_model.parameters():
                parameter.fill_(torch.nan)
        with _explained(backend, source):
            library.load(gpt_model, source.path, stored)
            parameters = gpt_model.named_parameters()
            missing = [name for name, parameter in parameters if parameter.isnan().any()]
            if missing:
                raise ValueError(f"it leaves out {', '.join(missing[:5])}")
        folder = scratch / iteration_name(None)
        folder.mkdir()
        common = common_state(make_megatron_args(source.model, **divisible, dtype=dtype), None)
        dist_checkpointing.save({"model": gpt_model.sharded_state_dict()} | common, str(folder))
        write_hf_metadata_folder(scratch, source.path, dtype)
        write_tracker(scratch, None)
        return reshard_checkpoint(scratch, out, **layout, progress=progress)


def megatron_to_hf_by(
    backend: str,
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_pickle: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Equals ``megatron_to_hf``, with the weights taken by a library of ``LIBRARIES``.

    Raises:
        ValueError: as ``megatron_to_hf`` and ``open_library``; a model that the library cannot
            convert, or weights of several dtypes.
        NotImplementedError: as ``megatron_to_hf``.
    """
    library, out = open_library(backend), Path(out_dir)
    options: dict[str, Any] = dict(hf_config=hf_config, trust_pickle=trust_pickle)
    has_tokenizer = megatron_to_hf(megatron_dir, out, **options, dry_run=True)
    source = MegatronFolder(megatron_dir, **options)
    if dry_run:
        return has_tokenizer
    stored = dtype or _only_dtype(source)
    with one_rank() as device, _scratch_folder(out) as scratch:
        gpt_model = build_gpt(source.model, stored, device)
        load_weights([gpt_model], source)
        config = source.hf_config or scratch / "config"
        if source.hf_config is None:
            config.mkdir()
            write_json(config / "config.json", source.model.config_json())
        with _explained(backend, source):
            library.export(gpt_model, config, scratch, stored)
        described = with_dtype(read_json(config / "config.json"), source.model.dtype)
        write_json(scratch / "config.json", described)
        write_hf(HfFolder(scratch), out, source.hf_config, dtype, max_shard_bytes, progress)
    return has_tokenizer


def _only_dtype(source: WeightSource) -> torch.dtype:
    """The dtype of all weights: a library's model has one.

    Raises:
        ValueError: naming two tensors that differ.
    """
    first, *others = source.shapes
    for name in others:
        if source.dtypes[name] != source.dtypes[first]:
            raise ValueError(
                f"{source.path}: {first} is {source.dtypes[first]}, {name} {source.dtypes[name]}; "
                "a library keeps one dtype: pass dtype=DTYPE, or use the direct conversion"
            )
    return source.dtypes[first]


def _require(backend: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    # What is missing beneath a library shows in more ways than ImportError.
    except Exception as error:
        raise ValueError(
            f"{backend}: {module} does not import ({error}); pip install {package} with what it "
            "needs, or use the direct conversion, which gives the same files"
        ) from error


@contextmanager
def _explained(backend: str, source: WeightSource) -> Iterator[None]:
    """Whatever a library raises at a model that it does not carry, as one clear error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{source.path}: {backend} does not convert this {source.model.architecture} "
            f"({reason}); use the direct conversion"
        ) from error


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, on the file system that has room for the model."""
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise ValueError(f"{out}: writing failed ({error}); nothing was kept") from error
