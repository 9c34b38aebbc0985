"""``torchrun ... -m megatron_pg.train CONFIG.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time

from ..rollout import RolloutServerError
from .config_file import load_config
from .dry_run import dry_run
from .ranks import launched_world_size, parallel_run
from .trainer import Trainer

# Ranks that make the same mistake leave the telling to the first one.
_FIRST_RANK_SECONDS = 5


def main() -> None:
    """Parse the command line and run.

    User mistakes, and a rollout server that fails for good, end with one message and exit code 2.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_pg.train", description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the config in one process, build nothing"
    )
    parser.add_argument("--world-size", type=int, help="ranks to check for with --dry-run")
    arguments = parser.parse_intermixed_args()
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.dry_run):
        parser.error("--world-size must be at least 1 and belongs to --dry-run")
    try:
        _run(arguments)
    except (ValueError, NotImplementedError, ImportError, RolloutServerError) as error:
        _exit_with(error)


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        world_size = arguments.world_size or launched_world_size()
        print("\n".join(dry_run(config, world_size).lines))
        return
    with parallel_run(config.parallel, config.run.seed) as ranks:
        Trainer(config, ranks).run()


def _exit_with(error: Exception) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # When the first rank fails too, the launcher ends this one meanwhile.
        time.sleep(_FIRST_RANK_SECONDS)
    where = f"rank {rank}: " if rank else ""
    print(f"error: {where}{error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # The launcher ends the other ranks; a normal exit would wait for them first.
    os._exit(2)


if __name__ == "__main__":
    main()
