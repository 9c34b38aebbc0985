"""Versions of Megatron-Core: which are tested, and what differs between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import megatron.core
from megatron.core import dist_checkpointing
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from packaging.version import Version

# The newest of every minor release. setup.py, tests/run.sh and README.md name the same.
TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


_RELEASE = Version(megatron.core.__version__).release[:2]
# Arguments of ``dist_checkpointing.save`` for the writer that is no process of its own. 0.19 has
# two writers; that of nvidia-resiliency-ext, its default, is a process.
_HAS_CHOICE = "async_strategy" in signature(dist_checkpointing.save).parameters
OWN_WRITER: Mapping[str, Any] = {"async_strategy": "mcore"} if _HAS_CHOICE else {}
# Whether ``attach_and_log_load_balancing_loss`` of a router multiplies a loss by the tokens of its
# own rank, though gradients are divided by those of the row.
DIVIDES_ROUTER_LOSSES = _RELEASE < (0, 19)
# Whether a rank that has a part of a group's query heads takes the same part of their gates.
DIVIDES_GATES = _RELEASE >= (0, 17)
# Whether there is a ``HybridModel``, out of the Mamba model that older ones have.
HAS_HYBRID_MODEL = _RELEASE >= (0, 18)
# Whether linear attention runs under context parallelism; older configurations refuse it.
DIVIDES_LINEAR_ATTENTION = _RELEASE >= (0, 18)
# Whether ``recompute_modules`` may name the gated norm of linear attention.
RECOMPUTES_GATED_NORM = _RELEASE >= (0, 19)
# Under the interleaved schedule older ones free activations while they are still being sent.
FREES_AFTER_SENDING = _RELEASE >= (0, 19)


def check_version(version: str) -> None:
    """Raise ImportError below the tested versions of Megatron-Core, and warn above them."""
    oldest, newest = (Version(TESTED_VERSIONS[end]).release[:2] for end in (0, -1))
    found = Version(version).release[:2]
    if found < oldest:
        raise ImportError(
            f"megatron-core {version} is older than {TESTED_VERSIONS[0]}, the oldest that "
            'megatron_pg supports: pip install "megatron_pg[megatron]"'
        )
    if found > newest:
        warnings.warn(
            f"megatron-core {version} is newer than {TESTED_VERSIONS[-1]}, the newest that "
            "megatron_pg was tested with; a setting that it does not know is refused",
            stacklevel=3,
        )


def missing_names() -> Iterator[tuple[Any, str, Any]]:
    """Modules, names in them that Megatron-Core reads wrongly, and what they should be.

    Without Transformer Engine, 0.16 reads ``te_general_gemm`` although it never defined it, and
    says that it has the classes of which latent attention then asks what is one.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        yield moe_utils, "te_general_gemm", None
    if not isinstance(multi_latent_attention.TELinear, type):
        yield multi_latent_attention, "HAVE_TE", False


check_version(megatron.core.__version__)
