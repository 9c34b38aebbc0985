"""Which groups go together: samples, groups and microbatches."""

from .types import Group, Microbatch, Sample, Status

__all__ = ["Group", "Microbatch", "Sample", "Status"]
