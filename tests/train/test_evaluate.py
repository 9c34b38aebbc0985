"""What cannot be judged is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.rollout import RecordedRollouts  # noqa: E402
from megatron_pg.train.config import RunConfig, TrainConfig  # noqa: E402
from megatron_pg.train.evaluate import evaluate  # noqa: E402
from megatron_pg.train.shared_stream import SharedStream  # noqa: E402
from tests.train import tiny  # noqa: E402


def test_rollouts_that_hold_no_prompts_out_are_refused() -> None:
    recorded = RecordedRollouts(tiny.make_groups(), shuffle=False, seed=0)
    stream = SharedStream(recorded, is_first=True)
    with pytest.raises(ValueError, match="run.eval_prompts=3 needs rollouts that are sampled"):
        evaluate(TrainConfig(run=RunConfig(eval_prompts=3)), stream)
