"""Rewards by name: each convention against its own numbers, each bad one by its sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_pg.rollout import (
    Judgement,
    NamedRewards,
    Prompt,
    RewardError,
    make_groups,
    reward_settings,
)

from .helpers import make_response
from .reward_functions import Gate

MODULE = "tests.rollout.reward_functions"
PATH = f"{MODULE}:"


def rewards(value: Any) -> NamedRewards:
    return NamedRewards(reward_settings(value))


def prompt(number: int = 0, messages: Any = None, text: str = "2 + 2", **columns: Any) -> Prompt:
    ids = torch.tensor([5, 6], dtype=torch.int64)
    return Prompt(
        prompt_id=f"p{number}", prompt_ids=ids, metadata=columns, text=text, messages=messages
    )


def scores(value: Any, texts: list[str], **columns: Any) -> list[float]:
    return [one.score for one in judge(value, texts, **columns)]


def judge(value: Any, texts: list[str], **columns: Any) -> list[Judgement]:
    made = rewards(value)
    try:
        prompts = [prompt(i, **columns) for i in range(len(texts))]
        made.check(prompts[0])
        return made.judge(prompts, [make_response(text) for text in texts])
    finally:
        made.close()


def named(value: Any) -> dict[str, Any]:
    settings = {"name": value} if isinstance(value, str) else value
    return {**settings, "name": PATH + settings["name"]}


ROW = {"answer": "4", "data_source": "sums", "extra_info": {"i": 7}, "level": 1}


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("ours", [4 + 1, 4 + 2]),
        ("verl", [1, 0]),
        ({"name": "verl_more", "kwargs": {"scale": 3}}, [3, 0]),
        ("verl_all", [1, 2]),
        ("trl", [1, 0]),
        ("trl_few", [0, 1]),
        ("awaited", [1, 2]),
        ("awaited_list", [1, 2]),
        ({"name": "Scaled", "kwargs": {"scale": 2}}, [2, 4]),
        ({"name": "Gate", "kwargs": {"scale": 2}}, [2, 2]),
    ],
    ids=str,
)
def test_a_convention_is_found_by_its_arguments(value: Any, want: list[float]) -> None:
    assert scores(named(value), ["4", "17"], **ROW) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("ours", [4 + 1, 4 + 2]),
        ({"name": "verl_more", "kwargs": {"scale": 3}}, [3, 0]),
        ("trl", [1, 0]),
        ("awaited", [1, 2]),
        ({"name": "Scaled", "kwargs": {"scale": 2}}, [2, 4]),
    ],
    ids=str,
)
def test_a_convention_is_kept_in_another_process(value: Any, want: list[float]) -> None:
    assert scores({**named(value), "num_processes": 1}, ["4", "17"], **ROW) == want


def test_math_is_at_hand() -> None:
    pytest.importorskip("math_verify", reason='pip install "megatron_pg[math]"')
    assert scores("math", ["so it is 4.", "17"], **ROW) == [1, 0]


def test_a_dict_gives_its_score_and_its_numbers() -> None:
    right, wrong = judge(PATH + "verl", ["4", "5"], **ROW)
    assert right == Judgement(score=1.0, metrics={"acc": 1.0, "source_len": 4.0, "index": 7.0})
    assert (wrong.score, wrong.metrics["acc"]) == (0.0, 0.0)
    assert "pred" not in right.metrics, "text is no metric"


def test_verl_is_told_of_an_unknown_source() -> None:
    (one,) = judge(PATH + "verl", ["4"], answer="4", extra_info={"i": 0})
    assert one.metrics["source_len"] == len("unknown")


def test_trl_gets_messages_for_a_chat_and_text_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, **columns)
        return [1.0] * len(prompts)

    monkeypatch.setattr(f"{MODULE}.look", look, raising=False)
    chat = [{"role": "user", "content": "2 + 2"}]
    prompts = [prompt(0, messages=chat, prompt=chat, level=1), prompt(1, text="<1>", other=2)]
    rewards(PATH + "look").judge(prompts, [make_response("4"), make_response("ab")])
    assert seen == {
        "prompts": [chat, "<1>"],
        "completions": [[{"role": "assistant", "content": "4"}], "ab"],
        "ids": [[ord("4")], [ord("a"), ord("b")]],
        "level": [1, None],
        "other": [None, 2],
    }


def test_several_rewards_are_weighted_and_each_is_a_metric() -> None:
    several = [{"name": PATH + "verl", "weight": 2}, {"name": PATH + "awaited", "weight": -0.5}]
    right, wrong = judge(several, ["4", "17"], **ROW)
    assert (right.score, wrong.score) == (2 * 1 - 0.5 * 1, 0 - 0.5 * 2)
    assert wrong.metrics == {
        "verl": 0.0, "verl/acc": 0.0, "verl/source_len": 4.0, "verl/index": 7.0, "awaited": 2.0,
    }  # fmt: skip


def test_rewards_of_one_name_are_told_apart_by_their_modules() -> None:
    other = "tests.rollout.failing_rewards:Same.verl"
    several = [PATH + "verl", {"name": other, "weight": 3}, PATH + "awaited"]
    (one,) = judge(several, ["4"], **ROW)
    assert one.score == 1 + 3 * 0.5 + 1 and {"awaited", "verl", "Same.verl"} < one.metrics.keys()
    several[1] = {"name": "tests.rollout.failing_rewards:verl", "weight": 3}
    (one,) = judge(several, ["4"], **ROW)
    ours, theirs = PATH + "verl", "tests.rollout.failing_rewards:verl"
    assert one.metrics[ours] == 1.0 and one.metrics[theirs] == 0.5
    assert one.metrics[f"{ours}/acc"] == 1.0 and one.metrics[f"{theirs}/acc"] == 0.25
    assert one.metrics["awaited"] == 1.0 and "verl" not in one.metrics


def test_none_of_trl_leaves_a_sample_to_the_other_rewards() -> None:
    several = [PATH + "trl_some", {"name": PATH + "awaited", "weight": 10}]
    first, second = judge(several, ["a", "b"])
    assert (first.score, second.score) == (1 + 10, 10)
    assert first.metrics == {"trl_some": 1.0, "awaited": 1.0}
    assert second.metrics == {"awaited": 1.0}
    with pytest.raises(RewardError, match="'p1' returned None, and no other reward a number"):
        judge(PATH + "trl_some", ["a", "b"])


@pytest.mark.parametrize("most", [1, 3])
def test_async_calls_are_under_way_together_up_to_a_limit(most: int) -> None:
    made = rewards({"name": PATH + "Gate", "max_concurrency": most})
    judged = made.judge([prompt(i) for i in range(9)], [make_response("a")] * 9)
    assert [one.score for one in judged] == [1.0] * 9
    gate = made.rewards[0].function
    assert isinstance(gate, Gate) and (gate.now, gate.most) == (0, most)


def test_an_async_call_is_cancelled_after_its_time() -> None:
    settings = {"name": PATH + "awaits_forever", "timeout_seconds": 0.2, "on_error": "score"}
    fine, late, also_fine = judge({**settings, "error_score": -2}, ["a", "hang", "b"])
    assert fine == also_fine == Judgement(score=1.0, metrics={"errors": 0.0, "timeouts": 0.0})
    assert late == Judgement(score=-2.0, metrics={"errors": 0.0, "timeouts": 1.0})
    with pytest.raises(RewardError, match=r"prompt 'p1' did not return within 0\.2 s; mend it, or"):
        judge({**settings, "on_error": "raise"}, ["a", "hang"])


BAD = {
    "none": "returned a reward that must be a number, got None",
    "nan": "returned a reward that is nan, must be finite; return a finite number, True or False,",
    "infinite": "returned a reward that is inf",
    "text": "returned a reward that must be a number, got '0.5'",
    "list": "returned a reward that must be a number, got [1.0]",
    "object": "returned an object of type object",
    "dict": "returned a dict without 'score' (['acc'])",
    "dict_none": "returned a 'score' that must be a number, got None",
    "dict_nan": "returned 'acc', which is nan, must be finite; leave it out",
    "huge": "returned a reward that is too large",
    "raises": "raised KeyError: 'missing' (",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_return_is_one_sentence_or_scored_and_counted(kind: str) -> None:
    with pytest.raises(RewardError) as caught:
        judge(PATH + "by_text", ["fine", kind])
    message = str(caught.value)
    assert message.startswith(f"rollout.reward '{PATH}by_text' for prompt 'p1' {BAD[kind]}")
    assert message.endswith("; mend it, or set its on_error to score") and "\n" not in message
    if kind == "raises":
        assert f"{MODULE.replace('.', '/')}.py, line " in message
    scored = {"name": PATH + "by_text", "on_error": "score", "error_score": -1.5}
    fine, bad = judge(scored, ["fine", kind])
    assert fine == Judgement(score=1.0, metrics={"errors": 0.0})
    assert bad == Judgement(score=-1.5, metrics={"errors": 1.0})


def test_a_number_that_is_called_as_failures_are_is_refused_where_they_are_counted() -> None:
    (free,) = judge(PATH + "counts_itself", ["a"])
    assert free.metrics == {"errors": 5.0, "timeouts": 3.0}
    with pytest.raises(
        RewardError, match="called 'errors' beside the reward, which on_error=score"
    ):
        judge({"name": PATH + "counts_itself", "on_error": "score"}, ["a"])


@pytest.mark.parametrize(("text", "want"), [("tensor", 2.5), ("flag", 1.0)])
def test_tensors_and_flags_are_numbers(text: str, want: float) -> None:
    assert scores(PATH + "by_text", [text]) == [want]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrong_length", "returned 3 values for 2 completions; return one number for each"),
        ("no_list", "returned a float; return a list of one number per completion"),
    ],
)
def test_a_bad_list_fails_every_sample(name: str, told: str) -> None:
    with pytest.raises(RewardError) as caught:
        judge(PATH + name, ["a", "b"])
    assert told in str(caught.value)
    judged = judge({"name": PATH + name, "on_error": "score"}, ["a", "b"])
    assert judged == [Judgement(score=0.0, metrics={"errors": 1.0})] * 2


def test_nothing_is_called_after_a_failure_that_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []

    def count(prompt: Any, response: Any) -> float:
        called.append(response.text)
        raise ValueError("no")

    monkeypatch.setattr(f"{MODULE}.count", count, raising=False)
    with pytest.raises(RewardError, match="'p0' raised ValueError: no"):
        judge(PATH + "count", ["a", "b"])
    assert called == ["a"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("two_unknown", "takes (completion, answer), which is none of f(prompt, response), verl's"),
        ("needs_more", "needs tokenizer, which nothing gives it; see kwargs"),
        ("Scaled", "missing 1 required positional argument: 'scale'"),
        ({"name": "Scaled", "kwargs": {"scal": 1}}, "unexpected keyword argument 'scal'"),
        (
            {"name": "verl_more", "kwargs": {"scale": 1, "scal": 1}},
            "'scal', which it does not",
        ),
        ({"name": "ours", "kwargs": {"prompt": 1}}, "kwargs has 'prompt', which every call gives"),
        ("missing", f"{MODULE} has no attribute 'missing'"),
        ({"name": "ours", "timeout_seconds": 1, "num_processes": 0}, "only another process can be"),
    ],
    ids=str,
)
def test_a_reward_that_cannot_be_called_is_refused(value: Any, told: str) -> None:
    settings = named(value)
    with pytest.raises(ValueError) as caught:
        rewards(settings)
    assert told in str(caught.value) and settings["name"] in str(caught.value)


def test_all_rewards_that_cannot_be_called_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"two_unknown'.*; rollout\.reward .*needs_more'"):
        rewards([PATH + "two_unknown", PATH + "ours", PATH + "needs_more"])


@pytest.mark.parametrize(
    ("name", "columns", "told"),
    [
        ("needs_column", {"answer": 1}, "needs 'difficulty', which prompts such as 'p0'"),
        ("verl", {"data_source": "a"}, "needs 'ground_truth'"),
        (
            "trl",
            {},
            "needs 'answer', which prompts such as 'p0' do not have (they have no",
        ),
    ],
)
def test_what_prompts_do_not_have_is_told_before_anything_is_sampled(
    name: str, columns: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError) as caught:
        rewards(PATH + name).check(prompt(**columns))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "rollout.reward is an empty list"),
        (3, "rollout.reward is 3, must be a name or a mapping with 'name'"),
        ({"weight": 1}, "has no 'name'"),
        ("maths", "name='maths' must be module:name, or one of math"),
        ({"name": "a:b", "wieght": 1}, "has an unknown key 'wieght'; did you mean 'weight'?"),
        ({"name": "a:b", "zzz": 1}, "has an unknown key 'zzz'; known are name, kwargs"),
        ({"name": "a:b", "weight": "1"}, "weight='1' must be a finite number"),
        ({"name": "a:b", "weight": float("nan")}, "weight=nan must be a finite number"),
        ({"name": "a:b", "timeout_seconds": 0}, "timeout_seconds=0 must be null or"),
        ({"name": "a:b", "num_processes": 1.0}, "num_processes=1.0 must be null or"),
        ({"name": "a:b", "max_concurrency": 0}, "max_concurrency=0 must be"),
        ({"name": "a:b", "on_error": "skip"}, "on_error='skip' must be one of raise, score"),
        ({"name": "a:b", "error_score": float("inf")}, "error_score=inf must be a finite number"),
        ({"name": "a:b", "kwargs": [1]}, "kwargs=[1] must be a mapping"),
        (["a:b", "c:b", {"name": "a:b"}], "rollout.reward has 'a:b' twice"),
        (["a:b", 3], "rollout.reward[1] is 3"),
    ],
    ids=str,
)
def test_settings_are_refused(value: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        reward_settings(value)
    assert told in str(caught.value)


def test_groups_carry_texts_sources_and_metrics() -> None:
    aborted = make_response("", status="aborted")
    prompts = [prompt(0, **ROW), prompt(1, text="", answer="5", extra_info={"i": 0})]
    answers = [(make_response("4"), aborted), (make_response("4"), make_response("5"))]
    first, second = make_groups(prompts, answers, rewards(PATH + "verl"))
    assert first.rewards.tolist() == [1.0, 0.0] and second.rewards.tolist() == [0.0, 1.0]
    metrics = {"acc": 1.0, "source_len": 4.0, "index": 7.0}
    known = {"prompt": "2 + 2", "data_source": "sums"}
    assert first.samples[0].metadata == {**known, "response": "4", "reward_metrics": metrics}
    assert first.samples[1].metadata == {**known, "response": ""}, "nothing judged it"
    assert second.samples[0].metadata.keys() == {"response", "reward_metrics"}


def test_all_responses_of_a_step_are_judged_in_one_call() -> None:
    prompts = [prompt(i) for i in range(3)]
    answers = [(make_response("a" * (i + 1)), make_response("b")) for i in range(3)]
    groups = make_groups(prompts, answers, rewards(PATH + "trl_few"))
    assert [group.rewards.tolist() for group in groups] == [[0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("answer", "text", "want"),
    [
        (r"\frac{1}{2}", r"so $\boxed{0.5}$", 1.0),
        ("x^2 + 1", "$1 + x^2$", 1.0),
        ("x^2 + 1", "it is 1", 0.0),
        ("$x^2 + 1$", "$1 + x^2$", 1.0),
        (r"so \boxed{7}", "7", 1.0),
        ("1,234", "that is 1234", 1.0),
        (r"\sqrt{2}", r"$\boxed{\sqrt{2}}$", 1.0),
        ("(1, 2)", "$(1, 2)$", 1.0),
        ("42", "it is 41", 0.0),
        (42, "it is 42.", 1.0),
    ],
)
def test_math_knows_answers_with_and_without_dollars(answer: Any, text: str, want: float) -> None:
    pytest.importorskip("math_verify", reason='pip install "megatron_pg[math]"')
    assert scores({"name": "math", "num_processes": 0}, [text], answer=answer) == [want]
