"""Sampling with the trained model: prompts are encoded once, samples go on in lock-step.

``generate`` itself runs models, whose layers read what stands here: take it from ``mcore``.
"""

from .cache import GenerationCache
from .rows import DecodeSeqParams, PrefillSeqParams
from .sampling import Sampler, sample_uniforms

__all__ = [
    "DecodeSeqParams",
    "GenerationCache",
    "PrefillSeqParams",
    "Sampler",
    "sample_uniforms",
]
