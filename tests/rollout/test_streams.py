"""Recorded and sampled streams: order, ends, resuming."""

import json

import pytest

from megatron_pg.rollout import (
    GroupStream,
    RecordedRollouts,
    SampledRollouts,
    SamplingParams,
)

from .helpers import make_prompt, make_recording, make_response


def ids(groups):
    return [group.group_id for group in groups]


def test_every_epoch_holds_every_group_once_in_its_own_order():
    stream = RecordedRollouts(make_recording(20), seed=3)
    first, second = ids(stream.next_groups(20)), ids(stream.next_groups(20))
    names = [f"g{i}" for i in range(20)]
    assert sorted(first) == sorted(names)
    assert sorted(second) == sorted(f"{name}#1" for name in names)
    assert first != names
    assert [name.removesuffix("#1") for name in second] != first


def test_a_step_that_spans_epochs_repeats_no_id():
    stream = RecordedRollouts(make_recording(3), seed=0)
    taken = ids(stream.next_groups(8))
    assert len(taken) == len(set(taken)) == 8
    assert {name.split("#")[0] for name in taken} == {"g0", "g1", "g2"}


def test_seed_fixes_the_order():
    def order(seed):
        return ids(RecordedRollouts(make_recording(20), seed=seed).next_groups(20))

    assert order(1) == order(1) != order(2)
    unshuffled = RecordedRollouts(make_recording(4), shuffle=False)
    assert ids(unshuffled.next_groups(5)) == ["g0", "g1", "g2", "g3", "g0#1"]


def test_stream_ends_after_its_epochs():
    stream = RecordedRollouts(make_recording(3), num_epochs=2)
    assert [len(stream.next_groups(4)) for _ in range(3)] == [4, 2, 0]


@pytest.mark.parametrize("num_before", [0, 1, 4, 5, 13])
def test_resumed_stream_continues(num_before):
    def stream():
        return RecordedRollouts(make_recording(5), seed=9)

    whole = stream()
    expected = ids(whole.next_groups(num_before + 7))[num_before:] if num_before else None
    interrupted = stream()
    if num_before:
        interrupted.next_groups(num_before)
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    assert ids(resumed.next_groups(7)) == (expected or ids(whole.next_groups(7)))


def test_recorded_rollouts_refuse():
    with pytest.raises(ValueError, match="groups is empty"):
        RecordedRollouts([])
    with pytest.raises(ValueError, match="repeat a group_id"):
        RecordedRollouts(make_recording(1) * 2)
    with pytest.raises(ValueError, match="num_epochs=0"):
        RecordedRollouts(make_recording(1), num_epochs=0)
    with pytest.raises(ValueError, match="num_groups=0"):
        RecordedRollouts(make_recording(1)).next_groups(0)
    state = RecordedRollouts(make_recording(2), seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1, these rollouts have 2"):
        RecordedRollouts(make_recording(2), seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="num_groups=2, these rollouts have 3"):
        RecordedRollouts(make_recording(3), seed=1).load_state_dict(state)


class _Task:
    def prompts(self, start, count):
        return [make_prompt(number) for number in range(start, start + count)]


class _Source:
    def __init__(self):
        self.seeds = []
        self.versions = []

    def generate(self, prompts, params):
        self.seeds.append(params.seed)
        return [
            tuple(make_response("x" * (i + 1)) for i in range(params.num_generations))
            for _ in prompts
        ]

    def update_weights(self, export, version):
        self.versions.append(version)


def _sampled(source):
    params = SamplingParams(num_generations=3, max_response_tokens=4, seed=10)
    return SampledRollouts(_Task(), source, lambda prompt, response: len(response.text), params)


def test_sampled_rollouts_reward_and_resume():
    source = _Source()
    stream = _sampled(source)
    groups = stream.next_groups(2)
    assert ids(groups) == ["p0", "p1"]
    assert groups[0].rewards.tolist() == [1.0, 2.0, 3.0]
    resumed = _sampled(source)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert ids(resumed.next_groups(1)) == ids(stream.next_groups(1)) == ["p2"]
    assert source.seeds == [10, 12, 12]
    stream.update_weights(lambda folder: None, 5)
    assert source.versions == [5]


def test_both_are_group_streams():
    assert isinstance(RecordedRollouts(make_recording(1)), GroupStream)
    assert isinstance(_sampled(_Source()), GroupStream)
