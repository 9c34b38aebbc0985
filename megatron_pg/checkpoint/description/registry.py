"""Model families by Hugging Face's name of their architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .hf_model import HfModel

F = TypeVar("F", bound="type[HfModel]")

# architecture -> family; filled when ``families`` is imported
FAMILIES: dict[str, type[HfModel]] = {}


def register(architecture: str, model_type: str, *others: str) -> Callable[[F], F]:
    """Make a family known by the names that its ``config.json`` has for it.

    Args:
        architecture: the entry of ``architectures``.
        model_type: transformers' word for it.
        others: further words for it, of files that bring code of their own.
    """

    def add(family: F) -> F:
        assert architecture not in FAMILIES, architecture
        family.architecture, family.model_type = architecture, model_type
        family.other_types = others
        FAMILIES[architecture] = family
        return family

    return add
