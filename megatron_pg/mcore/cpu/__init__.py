"""Stand-ins with which Megatron-Core runs on gloo without a CUDA device."""

from .emulation import emulate_cuda, transformer_config_defaults

__all__ = ["emulate_cuda", "transformer_config_defaults"]
