"""What a call of the model takes beside a row."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

Forward = TypeVar("Forward", bound=Callable[..., Any])

_NOT_OF_A_ROW = {
    "attention_mask": "cu_seqlens_q say what a token sees",
    "decoder_input": "what is shared is found from token ids",
    "inference_context": "sampling goes through mcore.generate",
    "inference_params": "sampling goes through mcore.generate",
    "extra_block_kwargs": "the layers run other tokens than the row's",
    "padding_mask": "padding runs as tokens of a sequence, as without it",
}


def refuse_arguments(position_embedding_type: object, **arguments: Any) -> None:
    """Raise NotImplementedError for what a row cannot have."""
    for name, reason in _NOT_OF_A_ROW.items():
        if arguments.get(name) is not None:
            raise NotImplementedError(f"{name} with a 'thd' row: {reason}; pass {name}=None")
    if position_embedding_type == "mrope":
        raise NotImplementedError(
            "position_embedding_type='mrope' is not supported with a 'thd' row; use 'rope', "
            "'yarn', 'learned_absolute' or 'none'"
        )


def names_arguments_of(stock: Callable[..., Any]) -> Callable[[Forward], Forward]:
    """Decorator: the function's signature names what ``stock`` takes and its ``**more`` hands on.

    Trainers look there for what a model can do; verl for ``output_processor``, without which it
    replaces the whole ``forward`` by one that shares nothing.
    """

    def named(function: Forward) -> Forward:
        own = signature(function)
        *parameters, more = own.parameters.values()
        assert more.kind is Parameter.VAR_KEYWORD
        others = [
            p.replace(kind=Parameter.KEYWORD_ONLY)
            for name, p in signature(stock).parameters.items()
            if name not in own.parameters and p.kind is not Parameter.VAR_KEYWORD
        ]
        function.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, *others, more]
        )
        return function

    return named
