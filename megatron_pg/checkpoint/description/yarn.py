"""YaRN's settings in Hugging Face's spelling, in Megatron-Core's and in Megatron-LM's arguments."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .argument_values import ArgumentValues
from .config_values import ConfigValues

# field -> what Megatron-Core's configuration and Megatron-LM's arguments call it
_CONFIG = dict(
    original_max_position_embeddings="yarn_original_max_position_embeddings",
    beta_fast="yarn_beta_fast",
    beta_slow="yarn_beta_slow",
    mscale="yarn_mscale",
    mscale_all_dim="yarn_mscale_all_dim",
    truncate="yarn_correction_range_round_to_int",
)
_ARGUMENTS = _CONFIG | dict(mscale="mscale", mscale_all_dim="mscale_all_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """How YaRN scales, besides its factor.

    Attributes:
        original_max_position_embeddings: context before.
        beta_fast: turns within it above which a frequency stays.
        beta_slow: turns below which a frequency is divided by the factor.
        mscale: of the factor on cosine and sine.
        mscale_all_dim: of the factor that divides it; latent attention scales its scores by it too.
        truncate: whether the range between the two is rounded outwards.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def scale(self, factor: float) -> float:
        """What cosine and sine are multiplied by."""
        above, below = (
            0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
            for scale in (self.mscale, self.mscale_all_dim)
        )
        return above / below

    def config_json(self) -> dict[str, Any]:
        """Keys of a rope section."""
        settings = asdict(self)
        if not self.mscale_all_dim:
            del settings["mscale"], settings["mscale_all_dim"]
        return settings

    def transformer_config(self, factor: float) -> dict[str, Any]:
        """Fields of ``mcore.DecoderConfig``."""
        settings = {_CONFIG[name]: value for name, value in asdict(self).items()}
        return settings | dict(yarn_rotary_scaling_factor=factor)

    def megatron_arguments(self, factor: float) -> dict[str, Any]:
        """Megatron-LM's arguments."""
        settings = {_ARGUMENTS[name]: value for name, value in asdict(self).items()}
        return settings | dict(rotary_scaling_factor=factor)


YARN_ARGUMENTS = {*_ARGUMENTS.values(), "rotary_scaling_factor"}


def read_yarn(rope: ConfigValues, factor: float, whole: ConfigValues) -> Yarn:
    """From a rope section of a ``config.json``; what is wrong is left in ``rope``.

    Args:
        rope: the section.
        factor: by which it scales.
        whole: the file, whose own ``original_max_position_embeddings`` counts too.
    """
    length = whole.size("max_position_embeddings", default=None)
    outside = whole.size("original_max_position_embeddings", default=None)
    original = rope.size("original_max_position_embeddings", default=outside or length or 1)
    if outside not in (None, original):
        rope.problems.append(f"original_max_position_embeddings is {original} and {outside}")
    yarn = Yarn(
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        truncate=rope.get("truncate") is None or rope.flag("truncate"),
        **_read_scales(rope),
    )
    given, computed = rope.number("attention_factor", 0.0, 1e6, default=None), yarn.scale(factor)
    if given is not None and not math.isclose(given, computed):
        rope.refused.append(f"attention_factor={given} (Megatron-Core computes {computed})")
    return yarn


def _read_scales(rope: ConfigValues) -> dict[str, float]:
    """Both, or neither: transformers takes no notice of one alone."""
    scales = {
        name: rope.number(name, 0.0, 1e3, default=0.0) for name in ("mscale", "mscale_all_dim")
    }
    if all(scales.values()):
        return scales
    if any(scales.values()) and scales["mscale"] != 1.0:
        rope.refused.append(f"mscale and mscale_all_dim of {list(scales.values())} (name both)")
    return {}


def read_yarn_arguments(read: ArgumentValues) -> Yarn:
    """From Megatron-LM's arguments, whose defaults are Megatron-Core's."""
    truncate = read.get("yarn_correction_range_round_to_int")
    return Yarn(
        original_max_position_embeddings=read.size("yarn_original_max_position_embeddings", 4096),
        beta_fast=read.number("yarn_beta_fast", 32.0),
        beta_slow=read.number("yarn_beta_slow", 1.0),
        mscale=read.number("mscale", 1.0) if read.get("mscale_all_dim") else 1.0,
        mscale_all_dim=read.number("mscale_all_dim") if read.get("mscale_all_dim") else 0.0,
        truncate=truncate is None or bool(truncate),
    )
