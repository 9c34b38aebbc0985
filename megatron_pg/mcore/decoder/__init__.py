"""What decoders have that no configuration of Megatron-Core declares and no spec of its has."""

from .config import DecoderConfig, make_transformer_config, transformer_config_class
from .layers import with_decoder_layers
from .model import fit_decoder

__all__ = [
    "DecoderConfig",
    "fit_decoder",
    "make_transformer_config",
    "transformer_config_class",
    "with_decoder_layers",
]
