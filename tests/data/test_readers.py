"""Readers: exact round trips, other trainers' files, text."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg.data import Group, pack_groups, read_rollouts, write_rollouts
from tests.data.samples import (
    TENSORS,
    LetterTokenizer,
    assert_same_groups,
    make_sample,
    random_groups,
)


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), num_groups=st.integers(1, 5), same_prompt=st.booleans())
def test_jsonl_round_trip(tmp_path_factory, seed, num_groups, same_prompt):
    path = tmp_path_factory.mktemp("rollouts") / "r.jsonl"
    groups = random_groups(seed, num_groups, same_prompt=same_prompt)
    write_rollouts(groups, path)
    assert_same_groups(read_rollouts(path), groups)


def test_round_trip_of_every_field(tmp_path):
    sample = make_sample(
        [1, 2],
        [3, 4],
        mask=[0, 1],
        reward=0.1,
        rollout_logprobs=[-1 / 3, 0.0],
        old_logprobs=[-1e-300, -745.1],
        ref_logprobs=[-2.0, -0.5],
        advantages=[1 / 7, -3.0],
    )
    full = type(sample)(
        **{name: getattr(sample, name) for name in TENSORS},
        reward=sample.reward,
        status="truncated",
        sample_id="s-1",
        metadata={"source": "α", "turns": [1, None]},
    )
    groups = [Group("a", (full,))]
    write_rollouts(groups, tmp_path / "r.jsonl")
    assert_same_groups(read_rollouts(tmp_path / "r.jsonl"), groups)
    # The same rows as parquet.
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    rows[0]["metadata"] = json.dumps(rows[0]["metadata"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert_same_groups(read_rollouts(tmp_path / "r.parquet"), groups)


def test_parquet_rows_with_nulls_and_several_batches(tmp_path):
    groups = random_groups(8, 30)
    write_rollouts(groups, tmp_path / "r.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"ref_logprobs": None, "metadata": None}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=7
    )
    assert len(rows) > 14
    assert_same_groups(read_rollouts(tmp_path / "r.parquet"), groups)


def test_write_refuses_what_cannot_be_read_back(tmp_path):
    group = Group("a", (make_sample([1], [2]),))
    with pytest.raises(ValueError, match="groups is empty"):
        write_rollouts([], tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="group 'a' is empty or there twice"):
        write_rollouts([group, group], tmp_path / "r.jsonl")
    odd = type(group.samples[0])(
        prompt_ids=torch.tensor([1]),
        response_ids=torch.tensor([2]),
        reward=0.0,
        loss_mask=torch.tensor([True]),
        metadata={"path": tmp_path},
    )
    with pytest.raises(ValueError, match="sample 0 of group 'b' cannot be written as JSON"):
        write_rollouts([Group("b", (odd,))], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_groups_by_id_in_order_of_first_appearance(tmp_path):
    rows = [
        {"prompt_ids": p, "response_ids": [r], "reward": r, "group_id": g}
        for p, r, g in [([1], 5, 7), ([1], 6, 3), ([1, 2], 7, 7)]
    ]
    (group, other) = read_rollouts(write_lines(tmp_path / "a.jsonl", rows))
    assert [group.group_id, other.group_id] == ["7", "3"]
    # Equal prompts under different ids stay apart; prompts that begin alike under one id together.
    assert [group.rewards.tolist(), other.rewards.tolist()] == [[5.0, 7.0], [6.0]]


def test_groups_by_prompt_without_ids(tmp_path):
    rows = [
        {"prompt_ids": p, "response_ids": [9], "reward": i}
        for i, p in enumerate([[1, 2], [1], [1, 2]])
    ]
    groups = read_rollouts(write_lines(tmp_path / "a.jsonl", rows))
    assert [g.group_id for g in groups] == ["prompt-0", "prompt-1"]
    assert [g.rewards.tolist() for g in groups] == [[0.0, 2.0], [1.0]]
    assert groups[0].samples[0].prompt_ids is groups[0].samples[1].prompt_ids


def test_scalar_advantage_and_mask_with_holes(tmp_path):
    row = {"prompt_ids": [1], "response_ids": [2, 3, 4], "reward": 1, "advantage": -2}
    path = write_lines(tmp_path / "a.jsonl", [row | {"loss_mask": [True, 0, 1]}])
    path_crlf = tmp_path / "b.jsonl"
    path_crlf.write_bytes(b"\r\n" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for file in (path, path_crlf):
        (group,) = read_rollouts(file)
        (sample,) = group.samples
        assert sample.advantages.tolist() == [-2.0] * 3
        assert sample.loss_mask.tolist() == [True, False, True]
        assert len(sample.tokens) == 4


def test_text_form(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    rows = [
        {"prompt": "ab", "response": "c", "reward": 1, "advantage": 0.5},
        {"prompt": "ab", "response": "d", "reward": 0, "advantage": 0.5, "status": "truncated"},
        {"prompt": chat, "response": "yo", "reward": 0, "advantage": 0.5},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    plain, chatty = read_rollouts(path, tokenizer=LetterTokenizer())
    assert plain.samples[0].prompt_ids.tolist() == [1, 97, 98]
    assert [s.response_ids.tolist() for s in plain.samples] == [[99], [100]]
    want = "system:s|user:hi|assistant:"
    assert chatty.samples[0].prompt_ids.tolist() == [ord(letter) for letter in want]
    plain, _ = read_rollouts(path, tokenizer=LetterTokenizer(), append_eos=True)
    assert [s.response_ids.tolist() for s in plain.samples] == [[99, 3], [100]]
    table = pyarrow.Table.from_pylist([rows[2]])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (again,) = read_rollouts(tmp_path / "a.parquet", tokenizer=LetterTokenizer())
    assert torch.equal(again.samples[0].tokens, chatty.samples[0].tokens)


def test_text_form_with_a_transformers_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {w: i for i, w in enumerate(["<unk>", "<bos>", "<eos>", "user", "hi", "yes"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    rows = [
        {"prompt": "hi", "response": "yes", "reward": 1},
        {"prompt": [{"role": "user", "content": "hi"}], "response": "yes", "reward": 1},
    ]
    plain, chat = read_rollouts(
        write_lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, append_eos=True
    )
    assert plain.samples[0].tokens.tolist() == [1, 4, 5, 2]
    assert chat.samples[0].tokens.tolist() == [1, 3, 4, 5, 2]


def slime_sample(**changes):
    sample = {
        "group_index": 4,
        "index": 9,
        "prompt": "p",
        "tokens": [1, 2, 3, 4, 5],
        "response": "r",
        "response_length": 3,
        "label": "x",
        "reward": 1.0,
        "loss_mask": [1, 0, 1],
        "rollout_log_probs": [-0.5, 0.0, -0.25],
        "status": "completed",
        "remove_sample": False,
        "metadata": {"turn": 2},
    }
    return sample | changes


def test_slime(tmp_path):
    samples = [
        slime_sample(),
        slime_sample(index=10, loss_mask=None, status="failed", reward=0.0),
        slime_sample(index=11, group_index=5, remove_sample=True, tokens=torch.arange(5)),
    ]
    torch.save({"rollout_id": 7, "samples": samples}, tmp_path / "data_7.pt")
    groups = read_rollouts(tmp_path / "data_7.pt")
    assert [g.group_id for g in groups] == ["7/4", "7/5"]
    first, failed = groups[0].samples
    assert (first.prompt_ids.tolist(), first.response_ids.tolist()) == ([1, 2], [3, 4, 5])
    assert first.loss_mask.tolist() == [True, False, True] and first.sample_id == "7/9"
    assert first.rollout_logprobs.tolist() == [-0.5, 0.0, -0.25]
    assert first.metadata["slime"]["metadata"] == {"turn": 2}
    assert failed.status == "aborted" and not failed.loss_mask.any()
    assert not groups[1].samples[0].loss_mask.any()


def test_slime_arrays(tmp_path):
    """miles stores routes as numpy arrays, and reward functions give numpy's numbers."""
    arrays = {
        "tokens": np.array([1, 2, 3, 4, 5], dtype=np.int32),
        "loss_mask": np.array([True, False, True]),
        "rollout_log_probs": torch.tensor([-0.5, 0.0, -0.25]),
        "reward": np.float32(0.5),
        "rollout_routed_experts": np.zeros((4, 2, 2), dtype=np.int32),
        "rollout_indexer_topk": torch.zeros(4, 2, 2),
    }
    torch.save({"rollout_id": 7, "samples": [slime_sample(**arrays)]}, tmp_path / "7.pt")
    torch.save({"rollout_id": 7, "samples": [slime_sample(reward=0.5)]}, tmp_path / "plain.pt")
    (routed,), plain = read_rollouts(tmp_path / "7.pt"), read_rollouts(tmp_path / "plain.pt")
    (sample,) = routed.samples
    assert sample.routed_experts.tolist() == [[[0, 0]] * 2] * 4 + [[[-1, -1]] * 2]
    bare = Group(routed.group_id, (replace(sample, routed_experts=None),))
    assert_same_groups([bare], plain)
    objects = slime_sample(tokens=np.array([1, None], dtype=object))
    torch.save({"rollout_id": 7, "samples": [objects]}, tmp_path / "7.pt")
    with pytest.raises(ValueError, match="does not load as plain data"):
        read_rollouts(tmp_path / "7.pt")


def test_slime_reward_parts(tmp_path):
    torch.save({"samples": [slime_sample(reward={"a": 1.0, "b": 0.5})]}, tmp_path / "d.pt")
    assert read_rollouts(tmp_path / "d.pt", reward_key="a")[0].rewards.tolist() == [1.0]
    assert read_rollouts(tmp_path / "d.pt", reward_key=["a", "b"])[0].rewards.tolist() == [1.5]
    message = r"field 'reward' has several parts in \['a', 'b'\]; write the number .* as 'reward'"
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="field 'reward' has no 'c'"):
        read_rollouts(tmp_path / "d.pt", reward_key="c")


@pytest.mark.parametrize("in_lists", [False, True])
def test_nemo_rl(tmp_path, in_lists):
    record = {
        "content": "text",
        "rewards": 0.5,
        "input_lengths": 5,
        "token_ids": [1, 2, 3, 4, 5, 0, 0],
        "token_loss_mask": [0, 0, 1, 0, 1, 0, 0],
        "sample_loss_mask": 1.0,
        "advantages": [0.25] * 7,
        "generation_logprobs": [0, 0, -0.5, 0, -1.5, 0, 0],
        "prev_logprobs": [0, -9, -0.75, -3, -1.25, 0, 0],
    }
    records = [record, record | {"sample_loss_mask": 0.0, "filtered_rewards": 0.75}]
    if in_lists:
        records = [{name: [value] for name, value in r.items()} for r in records]
    records = [r | {"idx": i} for i, r in enumerate(records)]
    a = write_lines(tmp_path / "train_data_step1.jsonl", records)
    b = write_lines(tmp_path / "train_data_step2.jsonl", records)
    groups = read_rollouts([a, b])
    # One prompt in two steps makes two groups.
    assert [len(g.samples) for g in groups] == [2, 2]
    trained, masked = groups[0].samples
    assert (trained.prompt_ids.tolist(), trained.response_ids.tolist()) == ([1, 2], [3, 4, 5])
    assert trained.loss_mask.tolist() == [True, False, True]
    assert trained.rollout_logprobs.tolist() == [-0.5, 0.0, -1.5]
    assert trained.old_logprobs.tolist() == [-0.75, -3.0, -1.25]
    assert trained.advantages.tolist() == [0.25] * 3
    assert trained.metadata["nemo_rl"] == {"content": "text", "idx": 0}
    assert not masked.loss_mask.any() and groups[0].rewards.tolist() == [0.5, 0.75]


def test_verl(tmp_path):
    records = [
        {"input": "q", "output": o, "gts": "4", "score": s, "step": 1, "acc": s}
        for o, s in (("a", 1.0), ("b", 0.0))
    ]
    path = write_lines(tmp_path / "1.jsonl", [*records, records[0] | {"step": 2}])
    groups = read_rollouts(path, tokenizer=LetterTokenizer())
    assert [g.rewards.tolist() for g in groups] == [[1.0, 0.0], [1.0]]
    assert groups[0].samples[0].metadata["verl"] == {"gts": "4", "step": 1, "acc": 1.0}
    with pytest.raises(ValueError, match="is text, and there is no tokenizer"):
        read_rollouts(path)


def test_verl_sessions_of_several_outputs(tmp_path):
    rows = [
        ("u_0_0", "q", "a", 0.0),
        ("u_0_2", "s", "c", 1.0),
        ("u_0_1", "qa", "b", 0.0),
        ("u_1_0", "q", "d", 0.25),
        ("w_w_0_10", "q", "e", 0.5),
        ("w_w_0_9", "q", "f", 0.0),
    ]
    records = [
        {"input": i, "output": o, "gts": None, "score": s, "step": 1, "uid": u}
        for u, i, o, s in rows
    ]
    path = write_lines(tmp_path / "1.jsonl", records)
    first, second = read_rollouts(path, tokenizer=LetterTokenizer())
    # A session has the reward of its last output.
    assert first.rollouts.tolist() == [0, 0, 0, 1]
    assert first.rewards.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert second.rollouts.tolist() == [0, 0] and second.rewards.tolist() == [0.5, 0.5]
    # Prompts are those of the outputs: a later one need not begin as the first does.
    prompts = [bytes(s.prompt_ids[1:].tolist()).decode() for s in first.samples]
    assert prompts == ["q", "s", "qa", "q"]
    write_lines(path := tmp_path / "1.jsonl", [*records, records[0] | {"uid": "u"}])
    with pytest.raises(ValueError, match="field 'uid' names prompt, session and output of some"):
        read_rollouts(path, tokenizer=LetterTokenizer())
    write_lines(path, [records[0], records[2], records[1] | {"score": None}])
    with pytest.raises(ValueError, match="3 problems .*\n.*line 1: field 'reward' is missing"):
        read_rollouts(path, tokenizer=LetterTokenizer())


def test_trl(tmp_path):
    rows = [
        {"step": 3, "prompt": "q", "completion": c, "good": r, "short": 0.5, "advantage": a}
        for c, r, a in (("a", 1.0, 0.7), ("b", 0.0, -0.7))
    ]
    path = tmp_path / "completions_00003.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (group,) = read_rollouts(path, tokenizer=LetterTokenizer(), reward_key=["good", "short"])
    assert group.rewards.tolist() == [1.5, 0.5]
    assert [s.advantages.tolist() for s in group.samples] == [[0.7], [-0.7]]
    message = r"may be any of the columns \['good', 'short'\]; keep one of them in the file"
    with pytest.raises(ValueError, match=message):
        read_rollouts(path, tokenizer=LetterTokenizer())
    for row in rows:
        del row["short"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (group,) = read_rollouts(path, tokenizer=LetterTokenizer())
    assert group.rewards.tolist() == [1.0, 0.0]


def test_what_was_read_packs(tmp_path):
    write_rollouts(random_groups(6, 10), tmp_path / "r.jsonl")
    microbatches = pack_groups(read_rollouts(tmp_path / "r.jsonl"), 40)
    assert len(microbatches) > 1 and all(mb.old_logprobs is not None for mb in microbatches)
