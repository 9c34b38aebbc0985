"""The recipe: groups in, a trained model out."""

from . import lifetime as lifetime
from .config import TrainConfig, load_config
from .dry_run import DryRun, dry_run
from .metrics import METRICS, Generations, Sink
from .ranks import parallel_run
from .run import open_run
from .trainer import Trainer

__all__ = [
    "METRICS",
    "DryRun",
    "Generations",
    "Sink",
    "TrainConfig",
    "Trainer",
    "dry_run",
    "load_config",
    "open_run",
    "parallel_run",
]
