"""Which groups go together: samples, groups and microbatches."""

from .types import Group, Microbatch, Sample

__all__ = ["Group", "Microbatch", "Sample"]
