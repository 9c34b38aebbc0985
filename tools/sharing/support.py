"""Whether training takes a model at all."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def training_refusal(values: dict[str, Any], where: str) -> str | None:
    """Why training refuses the model of a ``config.json`` or ``args.json``; None when it does not.

    None also where that is not known: without Megatron-Core, and for arguments that name no whole
    model.
    """
    try:
        from megatron_pg.checkpoint import hf_model_from_args, parse_hf_config
    except ImportError:
        return None
    if "architectures" in values:
        try:
            parse_hf_config(values, where)
        except (NotImplementedError, ValueError) as error:
            return str(error)
    elif "num_layers" in values:
        # Written as text in JSON; the weights' type changes nothing here.
        known = {key: value for key, value in values.items() if key != "params_dtype"}
        try:
            hf_model_from_args(Namespace(**known), where)
        except NotImplementedError as error:
            return str(error)
        except ValueError:
            return None
    return None
