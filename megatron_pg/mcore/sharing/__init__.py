"""The transparent model: ordinary packed rows in, shared tokens encoded once, the same rows out."""

from .model import PrefixSharingGPTModel, SharedTokens, count_shared_tokens

__all__ = ["PrefixSharingGPTModel", "SharedTokens", "count_shared_tokens"]
