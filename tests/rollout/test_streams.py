"""Recorded and sampled streams: order, ends, resuming."""

import json
import math
from dataclasses import replace

import pytest
import torch

from megatron_pg.rollout import (
    GroupStream,
    RecordedRollouts,
    Response,
    RolloutSource,
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
    with pytest.raises(ValueError, match="seed=1, these rollouts have seed=2"):
        RecordedRollouts(make_recording(2), seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="num_groups=2, these rollouts have num_groups=3"):
        RecordedRollouts(make_recording(3), seed=1).load_state_dict(state)
    first, second = make_recording(2)
    other = replace(second, samples=(replace(second.samples[0], reward=0.5), second.samples[1]))
    with pytest.raises(ValueError, match="of another recording"):
        RecordedRollouts([first, other], seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="num_taken=1.0, must be a whole number"):
        RecordedRollouts(make_recording(2), seed=1).load_state_dict(state | {"num_taken": 1.0})


class _Task:
    def prompts(self, start, count):
        return [make_prompt(number) for number in range(start, start + count)]


class _Source(RolloutSource):
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


class _Fixed(_Source):
    """Answers every prompt with the same responses."""

    def __init__(self, *responses):
        super().__init__()
        self.responses = responses

    def generate(self, prompts, params):
        return [self.responses for _ in prompts]


ABORTED = Response(response_ids=torch.tensor([], dtype=torch.int64), text="", status="aborted")


def with_logprobs(text, logprobs):
    return make_response(text, rollout_logprobs=torch.tensor(logprobs, dtype=torch.float64))


GOOD = with_logprobs("ab", [-1.0, -2.0])


@pytest.mark.parametrize(
    ("one", "complaint"),
    [
        (make_response("x" * 5), "response 1 has 5 tokens, at most 4 were asked"),
        (with_logprobs("a\xff", [-1.0, -1.0]), "response 1 token 1 is 255, must lie in"),
        (with_logprobs("ab", [-1.0, 0.5]), "response 1 logprob value 1 is 0.5"),
        (with_logprobs("ab", [-1.0, math.nan]), "response 1 logprob value 1 is nan"),
        (with_logprobs("ab", [-1.0, -9999.0]), "response 1 logprob value 1 is -9999.0"),
        (make_response("ab"), "some responses carry rollout_logprobs, others do not"),
    ],
)
def test_whatever_a_source_samples_is_held_to_the_rules(one, complaint):
    params = SamplingParams(num_generations=3, max_response_tokens=4)
    stream = SampledRollouts(_Task(), _Fixed(GOOD, one, GOOD), _fail, params, vocab_size=128)
    with pytest.raises(ValueError, match=f"prompt 'p0': {complaint}.*prompt 'p1'"):
        stream.next_groups(2)
    assert stream.state_dict() == {"num_taken": 0}


def test_a_source_samples_as_many_as_it_was_asked():
    params = SamplingParams(num_generations=3, max_response_tokens=4)
    stream = SampledRollouts(_Task(), _Fixed(GOOD, GOOD), _fail, params)
    with pytest.raises(ValueError, match="prompt 'p0': 2 responses instead of 3") as caught:
        stream.next_groups(15)
    assert str(caught.value).endswith("; and 5 more")


def _fail(prompt, response):
    raise AssertionError("nothing that cannot be trained is judged")


@pytest.mark.parametrize("num_aborted", [1, 2, 3])
def test_aborted_responses_stay_in_their_group_untrained_and_unjudged(num_aborted):
    responses = [ABORTED] * num_aborted + [GOOD] * (3 - num_aborted)
    params = SamplingParams(num_generations=3, max_response_tokens=4)
    judged = []

    def reward(prompt, response):
        judged.append(response)
        return 2.0

    stream = SampledRollouts(_Task(), _Fixed(*responses), reward, params, vocab_size=128)
    (group,) = stream.next_groups(1)
    assert [sample.status for sample in group.samples] == [one.status for one in responses]
    assert [sample.num_loss_tokens for sample in group.samples] == [
        0 if one is ABORTED else 2 for one in responses
    ]
    assert [len(sample.response_ids) for sample in group.samples[:num_aborted]] == [0] * num_aborted
    assert judged == [GOOD] * (3 - num_aborted)
    assert stream.state_dict() == {"num_taken": 1}


def test_both_are_group_streams():
    assert isinstance(RecordedRollouts(make_recording(1)), GroupStream)
    assert isinstance(_sampled(_Source()), GroupStream)


def test_prompts_of_other_replicas_share_no_id_either():
    class EverySecond(_Source):
        def numbers(self, num_prompts):
            return range(0, num_prompts, 2)

    class Twice(_Task):
        def prompts(self, start, count):
            found = super().prompts(start, count)
            return [found[0], *found[:-1]]

    source = EverySecond()
    params = SamplingParams(num_generations=3, max_response_tokens=4)
    stream = SampledRollouts(Twice(), source, lambda prompt, response: 1.0, params)
    with pytest.raises(ValueError, match="prompts share a prompt_id"):
        stream.next_groups(4)
