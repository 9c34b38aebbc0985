"""What started this rank, by its environment, and whether it is still there."""

from __future__ import annotations

import os
import socket

_CONNECT_SECONDS = 2


def launched_rank() -> int:
    """This process's rank by the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks by the launcher's environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_from_torchrun() -> bool:
    """Whether the parent process is torchrun's: others clean up by their own means."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_lost_torchrun() -> bool:
    """Whether torchrun is gone already when its rank looks for the first time: its store is."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return False
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=_CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
