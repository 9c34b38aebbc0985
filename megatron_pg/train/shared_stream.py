"""A stream of groups that is the same on every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data import Group
from ..rollout import GroupStream, OpenAIServerSource, SampledRollouts, WeightExporter
from .ranks import from_first_rank


class SharedStream:
    """A stream whose groups every rank receives from the first rank.

    Args:
        stream: the stream; None on ranks that never call it.
        needs_all_ranks: whether ``next_groups`` is itself a collective of all ranks.
        is_first: whether this is rank 0.
    """

    def __init__(
        self, stream: GroupStream | None, *, needs_all_ranks: bool, is_first: bool
    ) -> None:
        assert stream is not None or not (needs_all_ranks or is_first)
        self.stream = stream
        self.needs_all_ranks = needs_all_ranks
        self.is_first = is_first

    def start(self) -> str | None:
        """Wait for an inference server and say what it can do; None for any other source."""
        source = self.stream.source if isinstance(self.stream, SampledRollouts) else None
        if not isinstance(source, OpenAIServerSource):
            return None
        can = on_first_rank(source.start, self.is_first)
        return (
            f"rollout server: dialect {can.dialect}, "
            f"{'with' if can.returns_logprobs else 'without'} logprobs, "
            f"{'all responses of a prompt' if can.supports_n else 'one response'} per request"
        )

    def next_groups(self, num_groups: int) -> list[Group]:
        """The next groups, equal on every rank; an error on the first rank is raised on all."""
        if not self.needs_all_ranks:
            return list(on_first_rank(lambda: self._own().next_groups(num_groups), self.is_first))
        # Rewards may be random, so that the first rank's count.
        return list(from_first_rank(self._own().next_groups(num_groups)))

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Bring the source to the current policy; ``export`` is a collective of all ranks.

        An inference server reads the weights from ``export_dir``/version-<version>; the folders of
        earlier versions are removed once it has them.
        """
        if not isinstance(self.stream, SampledRollouts):
            return
        source = self.stream.source
        if not isinstance(source, OpenAIServerSource):
            self.stream.update_weights(export, version)
            return
        assert source.export_dir is not None
        folder = source.export_dir.resolve() / f"version-{version}"
        # What an interrupted run left there; an export refuses to overwrite.
        on_first_rank(lambda: shutil.rmtree(folder, ignore_errors=True), self.is_first)
        export(folder)
        on_first_rank(lambda: source.reload_weights(folder, version), self.is_first)
        if self.is_first:
            _remove_others(folder)

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, as the first rank knows it."""
        return dict(on_first_rank(lambda: self._own().state_dict(), self.is_first))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        if self.needs_all_ranks:
            self._own().load_state_dict(state)
        else:
            on_first_rank(lambda: self._own().load_state_dict(state), self.is_first)

    def _own(self) -> GroupStream:
        assert self.stream is not None
        return self.stream


def on_first_rank(action: Callable[[], Any], is_first: bool) -> Any:
    """What ``action`` returns on rank 0, on every rank; its error is raised on every rank."""
    result, error = None, None
    if is_first:
        try:
            result = action()
        except Exception as problem:  # passed on to every rank below
            error = problem
    result, error = from_first_rank((result, error))
    if error is not None:
        raise error
    return result


def _remove_others(folder: Path) -> None:
    for other in folder.parent.glob("version-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
