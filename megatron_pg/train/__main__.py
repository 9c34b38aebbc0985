"""``torchrun ... -m megatron_pg.train CONFIG.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Parse the command line and run; user mistakes end with one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m megatron_pg.train", description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the config in one process, build nothing"
    )
    parser.add_argument("--world-size", type=int, help="ranks to check for with --dry-run")
    arguments = parser.parse_args()
    # Imported here so that --help answers at once.
    from .config import load_config
    from .dry_run import dry_run

    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", "1"))
            print("\n".join(dry_run(config, world_size).lines))
            return
        from .ranks import parallel_run
        from .trainer import Trainer

        with parallel_run(config.parallel, config.run.seed) as ranks:
            Trainer(config, ranks).run()
    except (ValueError, NotImplementedError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        # The launcher ends the other ranks; a normal exit would wait for them first.
        os._exit(2)


if __name__ == "__main__":
    main()
