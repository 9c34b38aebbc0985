"""Families that are not held here, converted by Megatron Bridge, where that imports.

It reads and writes what it defines itself: nothing of it is checked here, and no other part of this
package takes a model of such a family.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .families import FAMILIES
from .files import read_json
from .new_folder import atomic_folder, check_absent


def hf_to_megatron_by_bridge(hf_dir: str | Path, out_dir: str | Path) -> Path:
    """Write a Hugging Face folder as a Megatron checkpoint, by Megatron Bridge's own conversion.

    Args:
        hf_dir: folder of a family that is not among ``FAMILIES``.
        out_dir: gets the checkpoint as Megatron Bridge writes it.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: a family that is held here, an output that exists, a library that does not
            import, or whatever it raises.
    """
    source, out = Path(hf_dir), Path(out_dir)
    _check_not_held(source)
    check_absent(out)
    with _explained(source) as auto_bridge, atomic_folder(out) as partial:
        auto_bridge.import_ckpt(str(source), str(partial))
    return out


def megatron_to_hf_by_bridge(
    megatron_dir: str | Path, out_dir: str | Path, *, hf_config: str | Path, trust_pickle: bool
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder, by Megatron Bridge's own conversion.

    Args:
        megatron_dir: a checkpoint that Megatron Bridge reads, which unpickles it.
        out_dir: gets the folder.
        hf_config: Hugging Face folder of the model, of a family that is not among ``FAMILIES``.
        trust_pickle: must be true: the checkpoint may run any code.

    Raises:
        ValueError: as ``hf_to_megatron_by_bridge``, and a checkpoint that is not trusted.
    """
    source, out = Path(hf_config), Path(out_dir)
    _check_not_held(source)
    if not trust_pickle:
        raise ValueError(
            f"{megatron_dir}: Megatron Bridge unpickles what it reads, which runs code from the "
            "files; where you trust their origin, pass trust_pickle=True"
        )
    check_absent(out)
    with _explained(source) as auto_bridge, atomic_folder(out) as partial:
        bridge = auto_bridge.from_hf_pretrained(str(source))
        bridge.export_ckpt(str(megatron_dir), str(partial), show_progress=False)


def _check_not_held(hf_dir: Path) -> None:
    named = read_json(hf_dir / "config.json").get("architectures")
    for name in named if isinstance(named, list) else []:
        if name in FAMILIES:
            raise ValueError(
                f"{hf_dir}: {name} is held here; convert it without Megatron Bridge, which checks "
                "neither names nor shapes"
            )


@contextmanager
def _explained(hf_dir: Path) -> Iterator[Any]:
    """``AutoBridge``; what it raises, as one clear error."""
    try:
        auto_bridge = importlib.import_module("megatron.bridge").AutoBridge
    # What is missing beneath it shows in more ways than ImportError.
    except Exception as error:
        raise ValueError(
            f"{hf_dir}: megatron.bridge does not import ({error}); pip install megatron-bridge "
            f"and Transformer Engine. Without it there are {', '.join(FAMILIES)}"
        ) from error
    try:
        yield auto_bridge
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{hf_dir}: Megatron Bridge does not convert it ({reason})") from error
