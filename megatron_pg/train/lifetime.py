"""How the process of a rank ends: one message for all ranks, at once, with a telling exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from .launcher import has_lost_torchrun, is_from_torchrun, launched_rank

# Exit codes beside 128 + signal.
_BUG, _MENDABLE, _LOST = 1, 2, 3
# Ranks that make the same mistake leave the telling to the first one, and those that lose another
# rank to that one; the launcher ends them meanwhile.
_FIRST_RANK_SECONDS, _LOST_RANK_SECONDS = 5, 4
_WATCH_SECONDS = 0.5
_LAST_WORDS_SECONDS = 2
_STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Lifetime:
    """Ends this process and says why; only the program itself may have one.

    Whatever ends the run, the process is gone at once, threads included: a rank that waited for
    others, in an exit handler or a collective, would keep the launcher or a pipe waiting.

    Attributes:
        advice: what to run to go on, when the run has got that far.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = lambda: ""
        self._is_watching = self._is_ending = False

    def watch(self) -> None:
        """End on Ctrl-C and SIGTERM, and soon after torchrun when that was killed."""
        if self._is_watching:
            return
        self._is_watching = True
        threading.excepthook = _leave_to_main_thread
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _STOPS:
            # A shell ignores Ctrl-C for jobs in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=_end_with_rank)
        # The main thread may be inside a collective, where no handler of Python's runs.
        _start_thread(self._end_on_signal, read)
        if is_from_torchrun():
            _start_thread(self._end_with_torchrun, os.getppid())

    @contextmanager
    def telling(self) -> Iterator[None]:
        """End the process, with one message, on whatever the block raises."""
        try:
            yield
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        rank = launched_rank()
        if _is_lost_rank(error):
            time.sleep(_LOST_RANK_SECONDS)
        elif rank:
            time.sleep(_FIRST_RANK_SECONDS)
        code, message, can_go_on = _explain(error)
        message = f"error: rank {rank}: {message}" if rank else f"error: {message}"
        self._exit(code, self._with_advice(message) if can_go_on else message)

    def _end_on_signal(self, read: int) -> None:
        number = 0
        while number not in _STOPS:
            number = os.read(read, 1)[0]
        stopped = f"stopped by {_STOPS[signal.Signals(number)]}"
        self._exit(128 + number, None if launched_rank() else self._with_advice(stopped))

    def _end_with_torchrun(self, parent: int) -> None:
        if not has_lost_torchrun():
            _wait_for_end_of(parent)
        gone = "error: the launcher of this run is gone"
        self._exit(_LOST, None if launched_rank() else self._with_advice(gone))

    def _with_advice(self, message: str) -> str:
        """The first rank, which is told of every end but a kill, says how to go on."""
        advice = ""
        if launched_rank() == 0:
            with suppress(Exception):  # nothing may keep the process from ending
                advice = self.advice()
        return f"{message}; {advice}" if advice else message

    def _exit(self, code: int, message: str | None) -> NoReturn:
        if self._is_ending:
            # Another thread is saying its last words.
            time.sleep(_LAST_WORDS_SECONDS)
        self._is_ending = True
        # Nobody may read what is written here.
        last_words = threading.Timer(_LAST_WORDS_SECONDS, os._exit, [code])
        last_words.daemon = True
        last_words.start()
        with suppress(OSError, ValueError):
            if message is not None:
                print(message, file=sys.stderr, flush=True)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _end_with_rank() -> None:
    """In a fork, a reward function's say: signals to it are its own, the rank's end is its too."""
    signal.set_wakeup_fd(-1)
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)

    def end(parent: int) -> None:
        _wait_for_end_of(parent)
        os._exit(_LOST)

    _start_thread(end, os.getppid())


def _wait_for_end_of(parent: int) -> None:
    # Not by a signal of the kernel's, which comes when the *thread* that made this process ends.
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)


def _start_thread(action: Callable[[int], None], argument: int) -> None:
    threading.Thread(target=action, args=(argument,), daemon=True).start()


def _leave_to_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Be silent about what a thread cannot write: its owner hears of it, and tells."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _explain(error: BaseException) -> tuple[int, str, bool]:
    """Exit code, message, and whether to say how to go on: a refusal says what to do itself."""
    from ..rollout import RewardError, RolloutServerError

    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        return _LOST, "what reads the output of this run has ended", True
    if isinstance(error, OSError) and error.errno is not None:
        reason, place = error.strerror or str(error), str(error.filename or "this process")
        return _MENDABLE, reason if reason.startswith(place) else f"{place}: {reason}", True
    if isinstance(error, (ArithmeticError, RewardError, RolloutServerError)):
        return _MENDABLE, str(error), True
    if isinstance(error, (ValueError, NotImplementedError, ImportError)):
        return _MENDABLE, str(error), False
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else _BUG
        return code, f"sys.exit({error.code!r}) was called inside the run", False
    if _is_lost_rank(error):
        first = str(error).splitlines()[0]
        return _LOST, f"no connection to the other ranks ({first})", True
    return _BUG, "".join(traceback.format_exception(error)).rstrip(), False


def _is_lost_rank(error: BaseException) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


# The program's own: a process that merely imports the package is not watched.
PROGRAM = Lifetime()
if sys.argv[:1] == ["-m"] and __package__ in sys.orig_argv:
    # Python is importing the package in order to run it, which takes seconds.
    PROGRAM.watch()
