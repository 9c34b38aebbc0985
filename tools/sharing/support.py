"""What training makes of a model's description."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_pg.checkpoint import HfModel


def training_model(values: dict[str, Any], where: str) -> tuple[HfModel | None, str | None]:
    """The model of a ``config.json`` or ``args.json`` as training reads it, or why it does not.

    Both of one that it reads once the weights are dequantised. Neither where that is not known:
    without Megatron-Core, and for arguments that name no whole model.
    """
    try:
        from megatron_pg.checkpoint import hf_model_from_args, parse_hf_config
    except ImportError:
        return None, None
    try:
        if "architectures" in values:
            return parse_hf_config(values, where), None
        if "num_layers" in values:
            # Written as text in JSON; the weights' type changes nothing here.
            known = {key: value for key, value in values.items() if key != "params_dtype"}
            return hf_model_from_args(Namespace(**known), where), None
    except NotImplementedError as error:
        if "quantization_config" not in values:
            return None, str(error)
        # Dequantised, as the refusal advises, the model has the sizes that it has now.
        plain = {key: value for key, value in values.items() if key != "quantization_config"}
        return training_model(plain, where)[0], str(error)
    except ValueError as error:
        return None, str(error) if "architectures" in values else None
    return None, None
