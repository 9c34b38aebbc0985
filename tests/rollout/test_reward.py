"""Rewards and the groups they make."""

import os
import sys
import tempfile

import pytest
import torch

from megatron_pg.rollout import (
    CombinedReward,
    FormatReward,
    load_callable,
    make_groups,
    math_verify_reward,
)

from .helpers import make_prompt, make_response


def length_reward(prompt, response):
    return float(len(response.text))


NOT_CALLABLE = 3


def test_load_callable_finds_functions_and_methods():
    assert load_callable("reward", f"{__name__}:length_reward") is length_reward
    assert load_callable("reward", "math:pi.__add__")(1) > 4


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("length_reward", "must have the form 'package.module:name'"),
        (":f", "must have the form"),
        ("my/reward.py:f", "names a file; name its module, reward:f, with my on PYTHONPATH"),
        ("math:", "must have the form"),
        ("no_such_package.rewards:f", "no module named 'no_such_package'; put its folder"),
        ("math:no_such_function", "math has no attribute 'no_such_function'"),
        (f"{__name__}:NOT_CALLABLE", "is a int, not a callable"),
    ],
)
def test_load_callable_refuses(path, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_callable("reward", path)


def test_combined_reward_is_the_weighted_sum():
    reward = CombinedReward(((1.0, length_reward), (0.5, FormatReward())))
    assert reward(make_prompt(), make_response("<answer>3</answer>")) == 18 + 0.5
    assert reward(make_prompt(), make_response("3")) == 1.0
    with pytest.raises(ValueError, match="parts is empty"):
        CombinedReward(())


def test_format_reward_needs_a_completed_full_match():
    reward = FormatReward()
    assert reward(make_prompt(), make_response("first\nthink <answer>\n3\n</answer> \n")) == 1.0
    assert reward(make_prompt(), make_response("<answer>3</answer> and more")) == 0.0
    assert reward(make_prompt(), make_response("<answer>3</answer>", status="truncated")) == 0.0


def test_math_verify_reward():
    pytest.importorskip("math_verify", reason='pip install "megatron_pg[math]"')
    prompt = make_prompt(answer="42")
    assert math_verify_reward(prompt, make_response(r"so it is $\boxed{42}$")) == 1.0
    assert math_verify_reward(prompt, make_response(r"so it is $\boxed{41}$")) == 0.0
    with pytest.raises(ValueError, match='no metadata\\["answer"\\]'):
        math_verify_reward(make_prompt(), make_response("42"))


def test_math_verify_reward_names_its_extra_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"megatron_pg\[math\]"):
        math_verify_reward(make_prompt(answer="1"), make_response("1"))


def test_make_groups_carries_everything_over():
    masked = make_response(
        "ab",
        rollout_logprobs=torch.tensor([-1.0, -2.0]),
        loss_mask=torch.tensor([True, False]),
        status="truncated",
        metadata={"weight_version": 3},
    )
    prompts = [make_prompt(0), make_prompt(1)]
    first, second = make_groups(
        prompts, [(masked, make_response("c")), (make_response("def"),)], length_reward
    )
    assert (first.group_id, second.group_id) == ("p0", "p1")
    assert first.rewards.tolist() == [2.0, 1.0]
    assert second.rewards.tolist() == [3.0]
    sample, unmasked = first.samples
    assert sample.tokens.tolist() == [100, 7, ord("a"), ord("b")]
    assert sample.loss_mask.tolist() == [True, False]
    assert unmasked.loss_mask.tolist() == [True]
    assert sample.rollout_logprobs.tolist() == [-1.0, -2.0]
    assert unmasked.rollout_logprobs is None
    assert sample.status == "truncated"
    assert sample.metadata == {"weight_version": 3, "response": "ab"}


def test_make_groups_refuses():
    prompts, responses = [make_prompt()], [(make_response("a"),)]
    with pytest.raises(ValueError, match="0 groups of responses for 1 prompts"):
        make_groups(prompts, [], length_reward)
    with pytest.raises(ValueError, match="share a prompt_id"):
        make_groups(prompts * 2, responses * 2, length_reward)
    with pytest.raises(ValueError, match="gave nan for prompt 'p0'"):
        make_groups(prompts, responses, lambda prompt, response: float("nan"))
    with pytest.raises(ValueError, match="gave None for prompt 'p0'; return a finite number"):
        make_groups(prompts, responses, lambda prompt, response: None)


def test_a_reward_that_changes_the_directory_leaves_the_run_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []

    def wander(prompt, response):
        folders.append(os.getcwd())
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
        if response.text == "raises":
            raise OSError("lost")
        return 1.0

    make_groups([make_prompt()], [[make_response("a")]], wander)
    with pytest.raises(OSError, match="lost"):
        make_groups([make_prompt()], [[make_response("raises")]], wander)
    assert folders == [str(tmp_path)] * 2 and os.getcwd() == str(tmp_path)
