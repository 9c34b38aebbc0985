"""Package definition. Extras: see README.md, "Install"."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_pg/__init__.py").read_text())[1]

EXTRAS = {
    # Megatron-Core: 0.16.1 is the newest for Python 3.11, later releases need Python 3.12 and,
    # on CPU builds of torch, triton to be importable. psutil: undeclared need of its checkpoints.
    "megatron": [
        "megatron-core>=0.16.1,<0.20",
        "triton; python_version >= '3.12' and platform_machine == 'x86_64'",
        "psutil",
        "einops",
    ],
    "train": [
        "megatron_pg[megatron]",
        "omegaconf>=2.3",
        "rich>=13",
        "tensorboard>=2.14",
        "matplotlib>=3.8",
        "pyarrow>=14",
        "safetensors>=0.4",
        "transformers>=4.56",
    ],
    "wandb": ["wandb"],
    "rollout": ["reasoning-gym>=0.1.20", "requests", "urllib3>=2", "transformers>=4.56"],
    "math": ["math-verify>=0.8"],
    "convert": [
        "megatron_pg[megatron]",
        "safetensors>=0.4",
        "transformers>=4.56",
    ],
    "gguf": ["gguf>=0.10", "accelerate", "transformers>=4.56"],
    # Kernels of Gated DeltaNet layers on CUDA. mamba_ssm has none that pip could choose: README.md
    # of megatron_pg/mcore.
    "linear": ["megatron_pg[megatron]", "flash-linear-attention>=0.6"],
    "te": ["transformer-engine[pytorch]>=2.9"],
    "gpu": ["megatron_pg[megatron,te]", "flash-attn>=2.7"],
    "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.12", "mypy>=1.15", "pre-commit"],
}

setup(
    name="megatron_pg",
    version=VERSION,
    description="Encode every shared token once, exactly: prefix-grouped training on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_pg", "megatron_pg.*"]),
    package_data={"megatron_pg": ["**/*.cpp", "**/*.md", "py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.9", "numpy>=1.26"],
    extras_require=EXTRAS,
)
