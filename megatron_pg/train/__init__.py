"""The recipe: groups in, a trained model out."""

from .config import TrainConfig, load_config
from .dry_run import DryRun, dry_run
from .ranks import Ranks, parallel_run
from .trainer import Trainer

__all__ = ["DryRun", "Ranks", "TrainConfig", "Trainer", "dry_run", "load_config", "parallel_run"]
