"""What a run would do, and take, said beforehand in one process."""

from .report import DryRun, dry_run

__all__ = ["DryRun", "dry_run"]
