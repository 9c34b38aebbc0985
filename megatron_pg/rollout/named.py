"""Objects of one's own, named by import path in a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_callable(what: str, path: str) -> Callable[..., Any]:
    """The callable at an import path ``package.module:name``.

    Args:
        what: is loaded, for messages.
        path: of it.

    Raises:
        ValueError: if the path has another form, the module cannot be found, or the name is not a
            callable of it.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{what} {path!r} must have the form 'package.module:name'")
    if module_name.endswith(".py"):
        file = Path(module_name)
        raise ValueError(
            f"{what} {path!r} names a file; name its module, {file.stem}:{name}, with "
            f"{file.parent} on PYTHONPATH"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {path!r}: no module named {error.name!r}; put its folder on PYTHONPATH"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{what} {path!r}: {module_name} has no attribute {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{what} {path!r} is a {type(found).__name__}, not a callable")
    loaded: Callable[..., Any] = found
    return loaded
