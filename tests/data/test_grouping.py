"""Which rows of which files form a group, in every format."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_pg.data import read_rollouts, write_rollouts
from tests.data.samples import LetterTokenizer, assert_same_groups, random_groups
from tests.data.slime import FAN_OUT, PLAIN, SLIME, P, Q, save_slime, slime_sample


@pytest.mark.parametrize("case", SLIME)
def test_slime_groups_by_prompt_whatever_the_sample_s_rollout_id(tmp_path, case):
    samples, rollouts = SLIME[case]
    groups = read_rollouts(save_slime(tmp_path / "7.pt", samples))
    assert [g.group_id for g in groups] == ["7/0", "7/1"]
    assert [g.rollouts.tolist() for g in groups] == rollouts
    assert sum(len(g.samples) for g in groups) == len(samples)
    # Another rollout has groups of its own.
    later = save_slime(tmp_path / "8.pt", samples, rollout_id=8)
    ids = [g.group_id for g in read_rollouts([tmp_path / "7.pt", later])]
    assert ids == ["7/0", "7/1", "8/0", "8/1"]
    write_rollouts(groups, tmp_path / "again.jsonl")
    again = read_rollouts(tmp_path / "again.jsonl")
    assert [g.rollouts.tolist() for g in again] == rollouts


# samples, field, part of the message
BAD_SLIME = {
    "two samples of one index": (
        [PLAIN[0], PLAIN[1] | {"index": 0}],
        "sample 1: field 'sample_id' '7/0' is also that of",
    ),
    "a rollout of two rewards": (
        [FAN_OUT[0], FAN_OUT[1] | {"reward": 0.5}],
        "sample 1: field 'rollout_id' '7/0' .*sample 0, whose reward is 1.0, not 0.5",
    ),
    "a rollout of two prompts": (
        [s | {"rollout_id": 7, "reward": 1.0} for s in PLAIN],
        "sample 2: field 'rollout_id' is 7 in group_index 0 and 1",
    ),
    "an id that is a number with a point": (
        [PLAIN[0] | {"rollout_id": 1.5}],
        "sample 0: field 'rollout_id' must be an integer",
    ),
    "two prompts in one group": (
        [PLAIN[0], PLAIN[2] | {"group_index": 0}],
        "sample 1: field 'group_id' '7/0' is also that of .*sample 0.*own",
    ),
}


@pytest.mark.parametrize("case", BAD_SLIME)
def test_slime_samples_that_contradict_each_other(tmp_path, case):
    samples, message = BAD_SLIME[case]
    with pytest.raises(ValueError, match="7.pt, " + message):
        read_rollouts(save_slime(tmp_path / "7.pt", samples))


def test_an_aborted_slime_sample_needs_no_tokens_no_reward_and_no_logprobs(tmp_path):
    nothing = {"rollout_log_probs": None, "loss_mask": None, "status": "aborted"}
    samples = [
        slime_sample(0, 4, [], [], None, **nothing),
        *PLAIN,
        slime_sample(1, 5, Q, [], None, **nothing),
        slime_sample(1, 6, Q, [4, 4], None, **nothing),
    ]
    first, second = read_rollouts(save_slime(tmp_path / "7.pt", samples))
    # Aborted before it was tokenized, it has the prompt of its group.
    assert [s.prompt_ids.tolist() for s in first.samples] == [P] * 3
    assert [s.status for s in first.samples] == ["aborted", "completed", "completed"]
    assert [len(s.response_ids) for s in second.samples] == [1, 2, 0, 2]
    assert [s.num_loss_tokens for s in second.samples] == [1, 2, 0, 0]


def own_jsonl(path, prompt, rewards, first=0):
    rows = [
        {"prompt_ids": prompt, "response_ids": [3, i], "reward": r, "group_id": 0, "sample_id": i}
        for i, r in enumerate(rewards, first)
    ]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_gzip(path, prompt, rewards, first=0):
    plain = own_jsonl(path, prompt, rewards, first)
    plain.with_suffix(".jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return plain.with_suffix(".jsonl.gz")


def own_parquet(path, prompt, rewards, first=0):
    lines = own_jsonl(path, prompt, rewards, first).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        row["__index_level_0__"] = number + 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def own_without_ids(path, prompt, rewards, first=0):
    rows = [{"prompt_ids": prompt, "response_ids": [3, 4], "reward": r} for r in rewards]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def slime(path, prompt, rewards, first=0):
    samples = [slime_sample(0, i, prompt, [3], r) for i, r in enumerate(rewards, first)]
    return save_slime(path.with_suffix(".pt"), samples, rollout_id=None)


def nemo_rl(path, prompt, rewards, first=0):
    rows = [
        {
            "input_lengths": len(prompt) + 1,
            "token_ids": [*prompt, 3],
            "token_loss_mask": [0] * len(prompt) + [1],
            "rewards": r,
        }
        for r in rewards
    ]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl(path, prompt, rewards, first=0):
    rows = [{"input": str(prompt), "output": "o", "score": r, "step": 1} for r in rewards]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trl(path, prompt, rewards, first=0):
    rows = [{"step": 1, "prompt": str(prompt), "completion": "o", "acc": r} for r in rewards]
    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = [own_jsonl, own_gzip, own_parquet, own_without_ids, slime, nemo_rl, verl, trl]


@pytest.mark.parametrize("prompts", [([1, 2], [7, 8]), ([1, 2], [1, 3]), ([1, 2], [1, 2])])
@pytest.mark.parametrize("write", WRITERS)
def test_ids_may_start_anew_in_every_file(tmp_path, write, prompts):
    files = [write(tmp_path / f"step{i}", p, [1.0, float(i)]) for i, p in enumerate(prompts)]
    groups = read_rollouts(files, tokenizer=LetterTokenizer())
    assert [g.rewards.tolist() for g in groups] == [[1.0, 0.0], [1.0, 1.0]]
    ids = [g.group_id for g in groups]
    assert len(set(ids)) == 2
    if write in (nemo_rl, verl, trl):
        assert ids == [f"{file}:0" for file in files]


@pytest.mark.parametrize("write", WRITERS)
def test_a_group_may_be_spread_over_files_when_told(tmp_path, write):
    files = [write(tmp_path / f"part{i}", [1, 2], [2.0 * i, 1.0], first=2 * i) for i in range(2)]
    (group,) = read_rollouts(files, tokenizer=LetterTokenizer(), group_across_files=True)
    assert group.rewards.tolist() == [0.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("write", [own_jsonl, own_gzip, own_parquet, slime])
def test_sample_ids_are_unique_where_group_ids_are(tmp_path, write):
    files = [write(tmp_path / f"part{i}", [1, 2], [1.0]) for i in range(2)]
    assert len(read_rollouts(files)) == 2
    with pytest.raises(ValueError, match="field 'sample_id' '0' is also that of .*part0"):
        read_rollouts(files, group_across_files=True)


def test_an_id_of_two_prompts_is_refused(tmp_path):
    first, second = (own_jsonl(tmp_path / n, p, [1.0]) for n, p in (("a", [1, 2]), ("b", [7, 2])))
    second.write_text(second.read_text().replace('"sample_id": 0', '"sample_id": 9'))
    with pytest.raises(ValueError) as error:
        read_rollouts([first, second], group_across_files=True)
    text = str(error.value)
    assert f"{second}, line 1: field 'group_id' '0' is also that of {first}, line 1" in text
    assert "not even the first token" in text and "group_across_files=False" in text
    joined = tmp_path / "joined.jsonl"
    joined.write_text(first.read_text() + second.read_text())
    with pytest.raises(ValueError, match=r"line 2: .* give every prompt a group_id of its own$"):
        read_rollouts(joined)


TURNS = [
    {"prompt_ids": [1, 2], "response_ids": [3]},
    {"prompt_ids": [1, 2, 3, 4], "response_ids": [5]},
    {"prompt_ids": [9, 2], "response_ids": [3]},
]


def write_turns(path, *rollouts):
    """Rows of each rollout, with the fields that are given for all of them."""
    rows = [{"reward": 1.0} | fields | row for fields, rows in rollouts for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_sub_agent_may_begin_with_tokens_of_its_own(tmp_path):
    a, b = {"group_id": 0, "rollout_id": "a"}, {"group_id": 0, "rollout_id": "b", "reward": 0.5}
    path = write_turns(tmp_path / "r.jsonl", (a, TURNS), (b, TURNS[::-1]))
    (group,) = read_rollouts(path)
    assert group.rollouts.tolist() == [0, 0, 0, 1, 1, 1]
    assert group.rewards.tolist() == [1.0] * 3 + [0.5] * 3
    # A rollout that has no such beginning is one of another prompt, told once.
    path = write_turns(tmp_path / "r.jsonl", (a, TURNS[:2]), (b, [TURNS[2], TURNS[2]]))
    with pytest.raises(ValueError, match=r"1 problem .*\n.*line 3: field 'group_id' '0' is also"):
        read_rollouts(path)


def test_a_rollout_of_several_prompts_needs_the_id_of_its_group(tmp_path):
    path = write_turns(tmp_path / "r.jsonl", ({"rollout_id": "a"}, TURNS[:1] * 2))
    (group,) = read_rollouts(path)
    assert group.rollouts.tolist() == [0, 0]
    path = write_turns(tmp_path / "r.jsonl", ({"rollout_id": "a"}, TURNS[:2]))
    with pytest.raises(ValueError, match="line 2: field 'rollout_id' 'a' .*give all rows a group"):
        read_rollouts(path)
    # With it, every group may count its rollouts anew.
    first, second = ({"group_id": i, "rollout_id": 0} for i in range(2))
    path = write_turns(tmp_path / "r.jsonl", (first, TURNS[:2]), (second, TURNS[:1]))
    assert [g.rollouts.tolist() for g in read_rollouts(path)] == [[0, 0], [0]]


def test_rows_that_carry_advantages_may_have_rewards_of_their_own(tmp_path):
    fields = {"group_id": 0, "rollout_id": "a"}
    rows = [row | {"reward": float(i)} for i, row in enumerate(TURNS)]
    with pytest.raises(ValueError, match="2 problems .*\n.*field 'rollout_id' 'a' is also that of"):
        read_rollouts(write_turns(tmp_path / "r.jsonl", (fields, rows)))
    path = write_turns(tmp_path / "r.jsonl", (fields | {"advantage": 0.5}, rows))
    (group,) = read_rollouts(path)
    assert group.rollouts.tolist() == [0, 0, 0]


def test_loss_weights_stand_on_all_rows_of_a_group_or_on_none(tmp_path):
    fields = {"group_id": 0, "rollout_id": "a"}
    rows = [row | {"loss_weight": w} for row, w in zip(TURNS, (1, 0.5, None))]
    with pytest.raises(ValueError, match="line 3: field 'loss_weight' must be on all rows"):
        read_rollouts(write_turns(tmp_path / "r.jsonl", (fields, rows)))
    (group,) = read_rollouts(write_turns(tmp_path / "r.jsonl", (fields, rows[:2])))
    assert [s.loss_weight for s in group.samples] == [1, 0.5]


def test_ids_that_only_one_file_has_stay_as_they_are(tmp_path):
    first = own_jsonl(tmp_path / "a", [1, 2], [1.0])
    second = own_jsonl(tmp_path / "b", [1, 2], [1.0])
    second.write_text(second.read_text() + second.read_text().replace(": 0", ": 1"))
    ids = [g.group_id for g in read_rollouts([first, second])]
    assert ids == [f"{first}:0", f"{second}:0", "1"]


def test_ids_that_look_like_given_names_stay_apart(tmp_path):
    bare = own_without_ids(tmp_path / "a", [1, 2], [1.0])
    named = own_jsonl(tmp_path / "b", [1, 2], [1.0])
    named.write_text(named.read_text().replace('"group_id": 0', '"group_id": "prompt-0"'))
    assert [g.group_id for g in read_rollouts([bare, named])] == ["prompt-0", "prompt-0'"]


def test_groups_with_empty_responses_round_trip(tmp_path):
    groups = random_groups(4, 20, has_empty=True)
    assert any(not len(s.response_ids) for g in groups for s in g.samples)
    write_rollouts(groups, tmp_path / "r.jsonl")
    assert_same_groups(read_rollouts(tmp_path / "r.jsonl"), groups)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for row in rows:
        row["metadata"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert_same_groups(read_rollouts(tmp_path / "r.parquet"), groups)


ROW = {"prompt_ids": [1, 2], "response_ids": [3, 4], "reward": 1.0}
# fields of the first row; the second is ROW with logprobs
TRAINS_NOTHING = {
    "empty": {"response_ids": []},
    "empty and null reward": {"response_ids": [], "reward": None},
    "empty and aborted": {"response_ids": [], "status": "aborted"},
    "empty with values": {"response_ids": [], "rollout_logprobs": [], "loss_mask": []},
    "aborted": {"status": "aborted"},
    "aborted and null": {"status": "aborted", "response_ids": None, "reward": None},
    "aborted and trained": {"status": "aborted", "loss_mask": [1, 1], "reward": None},
}


@pytest.mark.parametrize("case", TRAINS_NOTHING)
def test_rows_that_train_nothing_stand_beside_others(tmp_path, case):
    path = tmp_path / "r.jsonl"
    rows = [ROW | TRAINS_NOTHING[case], ROW | {"rollout_logprobs": [-1, -1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = read_rollouts(path)
    nothing, whole = group.samples
    assert (nothing.status, nothing.num_loss_tokens) == ("aborted", 0)
    assert whole.num_loss_tokens == 2 and whole.rollout_logprobs is not None


def test_nemo_rl_response_of_no_tokens(tmp_path):
    path = nemo_rl(tmp_path / "a", [1, 2], [1.0, 0.5])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.append(rows[0] | {"input_lengths": 2, "token_loss_mask": [0, 0, 0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = read_rollouts(path)
    assert [len(s.response_ids) for s in group.samples] == [1, 1, 0]


@pytest.mark.parametrize(
    ("rewards", "got"),
    [
        ([True, False], [1.0, 0.0]),
        ([1, 0], [1.0, 0.0]),
        ([True, 0.5], [1.0, 0.5]),
    ],
)
@pytest.mark.parametrize("write", [own_jsonl, own_without_ids, slime, nemo_rl, verl])
def test_boolean_rewards_are_one_and_zero(tmp_path, write, rewards, got):
    (group,) = read_rollouts(write(tmp_path / "a", [1, 2], rewards), tokenizer=LetterTokenizer())
    assert group.rewards.tolist() == got


@pytest.mark.parametrize("write", [own_parquet, trl])
def test_boolean_columns_are_rewards(tmp_path, write):
    path = write(tmp_path / "a", [1, 2], [True, False])
    (group,) = read_rollouts(path, tokenizer=LetterTokenizer())
    assert group.rewards.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("write", [own_jsonl, own_parquet, slime, nemo_rl, verl, trl])
def test_a_null_reward_is_told_as_one(tmp_path, write):
    path = write(tmp_path / "a", [1, 2], [0.0, None, 1.0])
    with pytest.raises(ValueError, match=r"1 problem in .*\n.* [123]: field 'reward' is .*null"):
        read_rollouts(path, tokenizer=LetterTokenizer())


def test_trl_sums_the_rewards_that_apply(tmp_path):
    rows = [
        {"step": 1, "prompt": "q", "completion": "o", "math": m, "code": c, "note": None}
        for m, c in ((1.0, 0.5), (None, 0.5), (float("nan"), 0.25))
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (group,) = read_rollouts(path, tokenizer=LetterTokenizer(), reward_key=["math", "code"])
    assert group.rewards.tolist() == [1.5, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"any of the columns \['math', 'code'\]; .* reward_key"):
        read_rollouts(path, tokenizer=LetterTokenizer())
    for row in rows:
        del row["math"], row["code"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match="field 'reward' is null in note; score the sample"):
        read_rollouts(path, tokenizer=LetterTokenizer())


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz", "r.json.gz"])
@pytest.mark.parametrize("is_gzip", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_gzipped_and_marked(tmp_path, name, is_gzip, mark):
    line = mark + json.dumps(ROW).encode() + b"\r\n"
    # Files that were joined keep the mark of each, and gzip files may be joined too.
    content = gzip.compress(line) + gzip.compress(line) if is_gzip else line + line
    (tmp_path / name).write_bytes(content)
    (group,) = read_rollouts(tmp_path / name)
    assert [s.response_ids.tolist() for s in group.samples] == [[3, 4]] * 2


LISTS = {
    "large": pyarrow.large_list(pyarrow.int32()),
    "fixed": pyarrow.list_(pyarrow.uint16(), 2),
    "dictionary": pyarrow.list_(pyarrow.int64()),
}


@pytest.mark.parametrize("kind", LISTS)
def test_parquet_types_of_several_row_groups(tmp_path, kind):
    ids = pyarrow.array([f"g{i // 2}" for i in range(8)])
    columns = {
        "group_id": ids.dictionary_encode() if kind == "dictionary" else ids,
        "prompt_ids": pyarrow.array([[1, i // 2] for i in range(8)], LISTS[kind]),
        "response_ids": pyarrow.array([[3, i] for i in range(8)], LISTS[kind]),
        "reward": pyarrow.array([i / 8 for i in range(8)], pyarrow.float32()),
        "status": pyarrow.nulls(8),
        "__index_level_0__": pyarrow.array(range(8)),
        "__index_level_1__": pyarrow.array(["x"] * 8),
    }
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict(columns), path, row_group_size=3)
    groups = read_rollouts(path)
    assert [g.group_id for g in groups] == ["g0", "g1", "g2", "g3"]
    assert [s.tokens.tolist() for g in groups for s in g.samples] == [
        [1, i // 2, 3, i] for i in range(8)
    ]
    with pytest.raises(ValueError, match="field '__index__' is no field"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pydict(columns | {"__index__": range(8)}), path
        )
        read_rollouts(path)
