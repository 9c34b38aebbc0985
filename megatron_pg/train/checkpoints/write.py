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
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from ...checkpoint import FileChecksum, file_checksum
from ...mcore import OWN_WRITER
from .run_folder import writing


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's, which leaves what every rank means to write out of a checkpoint's description."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *more: Any) -> Any:
        if planned[1] is not None:
            vars(planned[1]).pop("all_local_plans", None)
        return super()._get_save_and_finalize_callbacks(writer, planned, *more)


class SaveStrategy:
    """Who writes what of a run's checkpoints: settled once, as their structure does not change.

    What several data-parallel ranks hold is written by one of them, each its share. Megatron-Core
    exchanges the structure for a first and a second checkpoint, and nothing for those that follow.
    """

    def __init__(self) -> None:
        self._is_checked = False
        self._strategy: Any = _Strategy("torch_dist", 1, cached_metadata=True)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if replicas.size() > 1:
            self._strategy = FullyParallelSaveStrategyWrapper(
                self._strategy, replicas, do_cache_distribution=True
            )

    def request(self, state: Mapping[str, Any], folder: Path) -> Any:
        """Megatron's request to write a sharded state dict; every rank takes part."""
        request = dist_checkpointing.save(
            dict(state),
            str(folder),
            self._strategy,
            async_sharded_save=True,
            validate_access_integrity=not self._is_checked,
            **OWN_WRITER,
        )
        self._is_checked = True
        return request


class CheckpointWrite:
    """One checkpoint on its way to disk; every rank takes part in each call.

    The files equal those of ``dist_checkpointing.save``. That forks the rank to write and collects
    the outcome through a server process; both outlive a rank that is killed, and keep its pipes,
    sockets and locks open. Here the rank writes, or a thread of it.

    Args:
        state: sharded state dict.
        folder: exists, is empty, and goes when the write fails.
        strategy: of the run.
        in_background: let a thread write a copy of the tensors, which may change meanwhile.
        publish: called by ``finish`` when the checkpoint is complete, with the checksums of this
            rank's files, which are read again where they are written: beside the next steps.

    Raises:
        OSError: naming the file that cannot be written.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        folder: Path,
        strategy: SaveStrategy,
        *,
        in_background: bool,
        publish: Callable[[Mapping[str, FileChecksum]], None],
    ) -> None:
        self._folder = folder
        self._publish = publish
        self._checksums: dict[str, FileChecksum] = {}
        self._failure: Exception | None = None
        # Megatron would start a server process to make this queue.
        filesystem_async._results_queue = queue.Queue()
        with self._discarded_on_failure():
            self._request = strategy.request(state, folder)
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
            self._publish(self._checksums)

    def _write(self, buckets: Sequence[Any]) -> None:
        written = {}
        try:
            for number, bucket in enumerate(buckets):
                path = Path(bucket[0])
                with writing(path):
                    written[number] = self._write_file(number, bucket)
                    self._checksums[path.name] = file_checksum(path)
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
