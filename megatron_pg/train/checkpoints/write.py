"""Writing a checkpoint in the rank itself: no process is left behind, however the rank ends."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from ...mcore import OWN_WRITER
from .run_folder import writing


class CheckpointWrite:
    """One checkpoint on its way to disk; every rank takes part in each call.

    The files equal those of ``dist_checkpointing.save``. That forks the rank to write and collects
    the outcome through a server process; both outlive a rank that is killed, and keep its pipes,
    sockets and locks open. Here the rank writes, or a thread of it.

    Args:
        state: sharded state dict.
        folder: exists, is empty, and goes when the write fails.
        in_background: let a thread write a copy of the tensors, which may change meanwhile.
        publish: called by ``finish`` when the checkpoint is complete.

    Raises:
        OSError: naming the file that cannot be written.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        folder: Path,
        *,
        in_background: bool,
        publish: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._publish = publish
        self._failure: Exception | None = None
        # Megatron would start a server process to make this queue.
        filesystem_async._results_queue = queue.Queue()
        with self._discarded_on_failure():
            self._request = dist_checkpointing.save(
                dict(state), str(folder), async_sharded_save=True, **OWN_WRITER
            )
        buckets = self._request.preload_fn() if self._request.preload_fn else []
        if in_background:
            sources = self._request.async_fn_args[1] if buckets else []
            buckets = [_copy(*pair) for pair in zip(buckets, sources)]
        self._thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether every rank has written its part."""
        done = torch.tensor(int(not self._thread.is_alive()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    def finish(self) -> None:
        """Wait for every rank and write what describes the whole.

        Raises:
            OSError: the same on every rank, if one of them could not write.
        """
        self._thread.join()
        failures: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, self._failure)
        with self._discarded_on_failure():
            for failure in failures:
                if failure is not None:
                    raise failure
            for finalize in self._request.finalize_fns:
                finalize()
            self._publish()

    def _write(self, buckets: Sequence[Any]) -> None:
        written = {}
        try:
            for number, bucket in enumerate(buckets):
                with writing(bucket[0]):
                    written[number] = self._write_file(number, bucket)
        except Exception as error:  # raised by finish, on every rank
            self._failure = error
            return
        if buckets:
            self._request.async_fn_args[2].put(written)

    def _write_file(self, number: int, bucket: Any) -> Any:
        outcome: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        transforms = self._request.async_fn.args[0]
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, outcome, pending, True
        )
        _, result = outcome.get_nowait()
        if isinstance(result, Exception):
            raise result
        return result

    @contextmanager
    def _discarded_on_failure(self) -> Iterator[None]:
        """Give the space back when something cannot be written."""
        try:
            with writing(self._folder):
                yield
        except OSError:
            if dist.get_rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise


def _copy(bucket: Any, source: Any) -> Any:
    """The bucket with tensors of its own: those that come from a GPU are copies of ``source``."""
    file, name, (objects, tensors) = bucket
    own = [
        (item, tensor.clone() if tensor is original else tensor)
        for (item, tensor), (_, original) in zip(tensors, source[2][1])
    ]
    return file, name, (objects, own)
