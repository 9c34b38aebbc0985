"""Validation of prompts, responses and sampling parameters."""

import pytest
import torch

from megatron_pg.rollout import Prompt, Response, SamplingParams

GOOD = {"num_generations": 4, "max_response_tokens": 16}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_generations": 0}, "num_generations=0 must be an integer of at least 1"),
        ({"num_generations": 2.0}, "num_generations=2.0"),
        ({"num_generations": True}, "num_generations=True"),
        ({"max_response_tokens": -1}, "max_response_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 0.0}, "set temperature > 0 or num_generations=1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_sampling_params_refuse(change, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        SamplingParams(**(GOOD | change))


def test_sampling_params_accept_a_list_of_stop_tokens():
    assert SamplingParams(**GOOD, stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(num_generations=1, max_response_tokens=1, temperature=0).top_k is None


@pytest.mark.parametrize(
    "ids", [torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)]
)
def test_tokens_must_be_a_vector_of_ids(ids):
    with pytest.raises(ValueError, match="must be a non-empty int64 vector"):
        Prompt(prompt_id="p", prompt_ids=ids)
    if ids.dtype == torch.int64 and ids.ndim == 1:
        return
    with pytest.raises(ValueError, match="response_ids must be an int64 vector"):
        Response(response_ids=ids, text="")


@pytest.mark.parametrize("status", ["completed", "truncated", "aborted"])
@pytest.mark.parametrize("ids", [[], [5, 6]])
@pytest.mark.parametrize("mask", [None, True])
def test_an_aborted_or_empty_response_trains_nothing(status, ids, mask):
    ids = torch.tensor(ids, dtype=torch.int64)
    given = None if mask is None else torch.ones_like(ids, dtype=torch.bool)
    one = Response(response_ids=ids, text="", status=status, loss_mask=given)
    if len(ids) and status != "aborted":
        assert (one.status, one.loss_mask) == (status, given)
        return
    assert one.status == "aborted"
    assert one.loss_mask.tolist() == [False] * len(ids)
    assert one.response_ids.tolist() == ids.tolist(), "no token is made up"


def test_a_status_is_one_of_three():
    with pytest.raises(ValueError, match="status='done' must be one of completed, truncated, ab"):
        Response(response_ids=torch.tensor([1]), text="", status="done")


@pytest.mark.parametrize("name", ["rollout_logprobs", "loss_mask"])
def test_response_has_one_entry_per_token(name):
    with pytest.raises(ValueError, match=f"{name} has shape"):
        Response(response_ids=torch.tensor([1, 2]), text="", **{name: torch.zeros(3)})
