"""verl's own functions over some of ours."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def rebound(method: Any, **functions: Callable[..., Any]) -> Any:
    """``method`` as it is, with some of the functions that its module names replaced for its call.

    verl has no seam between the parts of ``forward_backward_batch``. This runs its own code, of
    whatever version, and changes neither its module nor its class, which other engines use.

    Args:
        method: bound to its object.
        functions: by the name that the module of the method knows them by.

    Raises:
        NotImplementedError: if the method's code names no such function.
    """
    function = method.__func__
    missing = sorted(set(functions) - set(function.__code__.co_names))
    if missing:
        raise NotImplementedError(
            f"{function.__qualname__} of the installed verl does not call {', '.join(missing)}; "
            "verl 0.9 does"
        )
    own = FunctionType(
        function.__code__,
        function.__globals__ | functions,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return MethodType(own, method.__self__)
