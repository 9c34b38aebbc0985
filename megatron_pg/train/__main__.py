"""``torchrun ... -m megatron_pg.train CONFIG.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import TRACKER
from ..data import CARDS
from .config import RunConfig, config_example, config_help, load_config
from .dry_run import dry_run
from .launcher import launched_world_size
from .lifetime import PROGRAM
from .ranks import parallel_run
from .run import open_run

# Machines like this one, whatever they have.
_HERE = "here"


def main() -> None:
    """Parse the command line and run.

    What a person can mend (a mistake, a server that fails for good, a full disk) ends with one
    message and exit code 2, the loss of another rank or of the launcher with 3, Ctrl-C with 130,
    SIGTERM with 143; a dry run of what does not fit its cards with 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_pg.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config in one process, build nothing; exit code 1 if a rank does not fit",
    )
    parser.add_argument("--world-size", type=int, help="ranks to check for with --dry-run")
    parser.add_argument(
        "--card",
        choices=[*sorted(CARDS), _HERE],
        help="of every rank of a --dry-run; unless said h100 where this machine has no CUDA, and "
        "what it has elsewhere",
    )
    parser.add_argument("-h", "--help", action=_Help, help="show this, and every field, and exit")
    parser.add_argument(
        "--example", action=_Example, help="print a config of all fields at their defaults and exit"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.dry_run):
        parser.error("--world-size must be at least 1 and belongs to --dry-run")
    if arguments.card is not None and not arguments.dry_run:
        parser.error("--card belongs to --dry-run")
    PROGRAM.watch()
    with PROGRAM.telling():
        fits = _run(arguments)
    if not fits:
        sys.exit(1)


class _Help(argparse.Action):
    """Help with all fields, which are only described when somebody asks."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = "fields of a config:\n" + config_help()
        parser.print_help()
        parser.exit()


class _Example(_Help):
    """A config to begin with."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(config_example(), end="")
        parser.exit()


def _run(arguments: argparse.Namespace) -> bool:
    """Whether nothing is known against the run."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        world_size = arguments.world_size or launched_world_size()
        card = arguments.card or (_HERE if torch.cuda.is_available() else "h100")
        told = dry_run(config, world_size, None if card == _HERE else card)
        print("\n".join(told.lines), flush=True)
        return told.fits is not False
    PROGRAM.advice = lambda: how_to_go_on(config.run)
    # Inside, so that an error is told before the ranks take leave of each other.
    with (
        parallel_run(config.parallel, config.run.seed) as ranks,
        PROGRAM.telling(),
        open_run(config, ranks) as trainer,
    ):
        trainer.run()
    return True


def how_to_go_on(run: RunConfig) -> str:
    """What a run that ended early does when it is started again."""
    checkpoints = Path(run.out) / "checkpoints"
    tracker = checkpoints / TRACKER
    step = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if not step.isdigit():
        # A run that ends between publishing its first one and saying so.
        if not tracker.is_file() and any(checkpoints.glob("iter_*")):
            return f"{checkpoints} holds a checkpoint: the same command goes on after it"
        reason = " (run.save_interval=0)" if run.save_interval == 0 else ""
        return f"no checkpoint was written{reason}: the same command begins again at step 1"
    again = "the same command" if run.load else "the same command with run.load=true"
    return f"{again} goes on after step {step}, the newest checkpoint in {checkpoints}"


if __name__ == "__main__":
    main()
