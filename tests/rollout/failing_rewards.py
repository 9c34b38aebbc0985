"""Rewards that hang, die or leave something behind, for processes of their own; nothing heavy."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ACTIONS: dict[str, Callable[[], Any]] = {
    "fine": lambda: 1.0,
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "object": object,
    "raises": lambda: {}["missing"],
    "exits": lambda: sys.exit(3),
    "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    "sleeps": lambda: time.sleep(1000),
    # Within one call of C, where no thread and no handler of Python's runs.
    "regex": lambda: re.match(r"(a|a|aa)+$", "a" * 64 + "b"),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "gone": lambda: os._exit(7),
    # -1 as a process ends with it: beyond 128, and no signal's number.
    "minus": lambda: os._exit(255),
    "child": lambda: subprocess.run(["sleep", "1000"], check=True),
    "pid": os.getpid,
    "group": os.getpgrp,
    "threads": threading.active_count,
    # The child comes back from the call, too.
    "forked": lambda: float(os.fork() > 0),
    "digits": lambda: 10**5000,
    "large": lambda: {"score": 1, "why": "x" * 1_000_000},
}


def act(data_source: str, solution_str: str, ground_truth: Any = None) -> Any:
    """What the response says."""
    return ACTIONS[solution_str.split()[0]]()


async def act_later(data_source: str, solution_str: str) -> Any:
    await asyncio.sleep(0)
    return ACTIONS[solution_str]()


def verl(data_source: str, solution_str: str) -> dict[str, float]:
    """Called as one of ``reward_functions``."""
    return {"score": 0.5, "acc": 0.25}


class Same:
    verl = staticmethod(verl)


async def keep_loop(data_source: str, solution_str: str) -> float:
    """1 as long as the loop is the one that it met first, as a client must have it."""
    loop = asyncio.get_running_loop()
    loops.append(loop)
    return float(loops[0] is loop and not loop.is_closed())


loops: list[Any] = []


def note(data_source: str, solution_str: str) -> float:
    """Writes its process down, then hangs."""
    with open(solution_str, "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    child = subprocess.Popen(["sleep", "1000"])
    with open(solution_str, "a") as file:
        file.write(f"{child.pid}\n")
    re.match(r"(a|a|aa)+$", "a" * 64 + "b")
    return 1.0


def hang_batch(completions: list[str]) -> list[float]:
    if "hang" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)
