"""Recorded rollouts from files: records, their forms, rows, groups."""

from .readers import read_rollouts, write_rollouts

__all__ = ["read_rollouts", "write_rollouts"]
