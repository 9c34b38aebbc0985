"""Model families, one file each: adding one is adding its file here, and a test.

Every module of this folder is imported and registers its family by the name of its architecture.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..description import FAMILIES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES"]
