"""What cannot be judged is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.rollout import RecordedRollouts  # noqa: E402
from megatron_pg.train import parallel_run  # noqa: E402
from megatron_pg.train.config import ParallelConfig, RunConfig, TrainConfig  # noqa: E402
from megatron_pg.train.rollouts.evaluate import evaluate  # noqa: E402
from megatron_pg.train.rollouts.shared_stream import SharedStream  # noqa: E402
from tests.train import tiny  # noqa: E402


def test_rollouts_that_hold_no_prompts_out_are_refused() -> None:
    recorded = RecordedRollouts(tiny.make_groups(), shuffle=False, seed=0)
    stream = SharedStream(recorded, is_first=True)
    message = "run.eval_prompts=3: recorded rollouts have no prompts that could be held out"
    with parallel_run(ParallelConfig(), 0), pytest.raises(ValueError, match=message):
        evaluate(TrainConfig(run=RunConfig(eval_prompts=3)), stream)
