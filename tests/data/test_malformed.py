"""Every malformed input is refused, with file, row and field."""

from __future__ import annotations

import builtins
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_pg.data import read_rollouts
from megatron_pg.data.reading import schema
from megatron_pg.data.values import MAX_NESTING, nesting_problem

GOOD = {"prompt_ids": [1, 2], "response_ids": [3, 4], "reward": 1.0}
TEXT = {"prompt": "p", "response": "r", "reward": 1.0}
DROP = object()


def row_with(**changes):
    return {name: value for name, value in (GOOD | changes).items() if value is not DROP}


def text_with(**changes):
    return {name: value for name, value in (TEXT | changes).items() if value is not DROP}


def chat(*messages):
    return text_with(prompt=list(messages))


class Tokenizer:
    eos_token_id = None

    def encode(self, text, *, add_special_tokens):
        return [ord(letter) for letter in text.strip()]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        raise KeyError("no template")


# row, field that the error names, part of the message
BAD_ROWS = {
    "missing prompt_ids": (row_with(prompt_ids=DROP), "prompt_ids", "is missing"),
    "missing response_ids": (row_with(response_ids=DROP), "response_ids", "is missing"),
    "missing reward": (row_with(reward=DROP), "reward", "is missing"),
    "null reward": (row_with(reward=None), "reward", "is missing"),
    "nothing": ({}, "prompt_ids", "is missing"),
    "prompt_ids is a string": (row_with(prompt_ids="1 2"), "prompt_ids", "list of token ids"),
    "prompt_ids is a number": (row_with(prompt_ids=5), "prompt_ids", "list of token ids"),
    "empty prompt": (row_with(prompt_ids=[]), "prompt_ids", "has no tokens"),
    "null reward with a status": (row_with(reward=None, status="truncated"), "reward", "or null"),
    "float token": (row_with(response_ids=[3, 4.0]), "response_ids", "token 1 is 4.0 (float)"),
    "bool token": (row_with(prompt_ids=[True, 1]), "prompt_ids", "token 0 is True (bool)"),
    "null token": (row_with(prompt_ids=[1, None]), "prompt_ids", "token 1 is None"),
    "nested tokens": (row_with(prompt_ids=[[1]]), "prompt_ids", "token 0 is [1] (list)"),
    "string token": (row_with(prompt_ids=["1"]), "prompt_ids", "must be an integer"),
    "negative token": (row_with(response_ids=[3, -1]), "response_ids", "token 1 is -1"),
    "token past vocabulary": (row_with(response_ids=[3, 50]), "response_ids", "vocab_size is 50"),
    "token beyond int64": (row_with(prompt_ids=[2**70]), "prompt_ids", "must lie in [0, vocab"),
    "reward is NaN": (row_with(reward=float("nan")), "reward", "is nan, must be finite"),
    "reward is infinite": (row_with(reward=float("-inf")), "reward", "is -inf, must be finite"),
    "reward is a string": (row_with(reward="1"), "reward", "must be a number"),
    "reward is a number in a string": (row_with(reward="1.0"), "reward", "got '1.0' (str)"),
    "reward is a list": (row_with(reward=[1.0]), "reward", "must be a number"),
    "advantage is a bool": (row_with(advantage=True), "advantage", "must be a number"),
    "reward is an object": (row_with(reward={"a": 1}), "reward", "must be a number"),
    "reward beyond floats": (row_with(reward=10**400), "reward", "too large"),
    "mask too short": (row_with(loss_mask=[1]), "loss_mask", "has 1 values, the response has 2"),
    "mask value 2": (row_with(loss_mask=[1, 2]), "loss_mask", "value 1 is 2 (int), must be 0 or 1"),
    "mask of floats": (row_with(loss_mask=[1, 0.5]), "loss_mask", "must be 0 or 1"),
    "mask is a number": (row_with(loss_mask=1), "loss_mask", "must be a list of 0 and 1"),
    "logprobs too long": (row_with(old_logprobs=[-1.0] * 3), "old_logprobs", "has 3 values"),
    "logprob is NaN": (row_with(ref_logprobs=[-1, float("nan")]), "ref_logprobs", "value 1 is nan"),
    "logprob is -inf": (row_with(old_logprobs=[-1, float("-inf")]), "old_logprobs", "finite"),
    "positive logprob": (row_with(rollout_logprobs=[0.5, 0]), "rollout_logprobs", "at most 0"),
    "null logprob": (row_with(rollout_logprobs=[None, 0]), "rollout_logprobs", "must be a number"),
    "logprobs is a number": (row_with(old_logprobs=-1.0), "old_logprobs", "list of numbers"),
    "advantage list too short": (row_with(advantage=[1.0]), "advantage", "has 1 values"),
    "advantage is NaN": (row_with(advantage=float("nan")), "advantage", "must be finite"),
    "advantage is a string": (row_with(advantage="1"), "advantage", "must be a number"),
    "unknown status": (row_with(status="finished"), "status", "completed, truncated, aborted"),
    "status is a list": (row_with(status=["completed"]), "status", "must be one of"),
    "metadata is a list": (row_with(metadata=[1]), "metadata", "must be an object"),
    "metadata is no JSON": (row_with(metadata="{"), "metadata", "no JSON object"),
    "group_id is a float": (row_with(group_id=1.5), "group_id", "string or an integer"),
    "group_id is empty": (row_with(group_id=""), "group_id", "non-empty string"),
    "sample_id is a bool": (row_with(sample_id=False), "sample_id", "string or an integer"),
    "misspelt field": (row_with(rollout_logprob=[0, 0]), "rollout_logprob", "'rollout_logprobs'?"),
    "unknown field": (row_with(zzz=1), "zzz", "put it under 'metadata'"),
    "ids and text": (row_with(response="r"), "response", "stands beside token ids"),
    "text without response": (text_with(response=DROP), "response", "is missing"),
    "text without prompt": (text_with(prompt=DROP), "prompt", "is missing"),
    "text is a number": (text_with(response=5), "response", "must be a string"),
    "text without reward": (text_with(reward=None), "reward", "is missing or null"),
    "empty prompt text": (text_with(prompt=""), "prompt", "is an empty string"),
    "prompt is an object": (text_with(prompt={"role": "user"}), "prompt", "list of chat messages"),
    "no messages": (chat(), "prompt", "list of chat messages"),
    "message is a string": (chat("hi"), "prompt", "message 0 must be an object"),
    "unknown role": (chat({"role": "bot", "content": "x"}), "prompt", "has role 'bot'"),
    "no content": (chat({"role": "user"}), "prompt", "has no text under 'content'"),
    "template fails": (chat({"role": "user", "content": "x"}), "prompt", "KeyError: 'no template'"),
    "prompt text of no tokens": (text_with(prompt=" "), "prompt", "has no tokens"),
    "id beyond int64": (row_with(group_id=2**70), "group_id", "string or an integer"),
    "rollout_id is a float": (row_with(rollout_id=1.5), "rollout_id", "string or an integer"),
    "another name": (row_with(execution_id="a"), "execution_id", "its name here is 'rollout_id'"),
    "TRL's name": (row_with(completion_ids=[1]), "completion_ids", "here is 'response_ids'"),
    "SGLang's name": (row_with(output_ids=[1]), "output_ids", "here is 'response_ids'"),
    "verl's name": (row_with(response_mask=[1]), "response_mask", "its name here is 'loss_mask'"),
    "a score": (row_with(score=1), "score", "its name here is 'reward'"),
    "anyone's logprobs": (row_with(logprobs=[0.0]), "logprobs", "are the engine's that sampled"),
    "whole sequence": (row_with(input_ids=[1]), "input_ids", "say where the response begins"),
    "mask for text": (text_with(loss_mask=[1]), "loss_mask", "text does not determine"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(tmp_path, case):
    row, field, message = BAD_ROWS[case]
    path = tmp_path / "rollouts.jsonl"
    good = GOOD if "prompt_ids" in row else TEXT
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        read_rollouts(path, tokenizer=Tokenizer(), vocab_size=50 if good is GOOD else None)
    text = str(error.value)
    assert f"{path}, line 3: field {field!r}" in text
    assert message in text
    assert "line 1:" not in text


def test_there_are_many_cases():
    assert len(BAD_ROWS) > 50


# bytes of the file, part of the message
BAD_FILES = {
    "broken line": (b'{"prompt_ids": [1], \n', "line 1: is no JSON"),
    "cut last line": (json.dumps(GOOD).encode() + b'\n{"prompt_ids": [1', "line 2: is no JSON"),
    "array line": (b"[1, 2]\n", "line 1: must be an object, got a JSON list"),
    "number line": (b"5\n", "must be an object, got a JSON int"),
    "null line": (b"null\n", "must be an object, got a JSON NoneType"),
    "not UTF-8": (b'{"prompt": "\xff"}\n', "line 1: is not UTF-8 (byte 12)"),
    "array of several lines": (json.dumps([GOOD], indent=1).encode(), "one object a line"),
    "array after a mark": (b"\xef\xbb\xbf[\n{}\n]", "JSON array: one object a line"),
    "object of several lines": (json.dumps(GOOD, indent=1).encode(), "write one object a line"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is not UTF-8"),
    "UTF-16 without a mark": (json.dumps(GOOD).encode("utf-16-le"), "perhaps UTF-16"),
    "UTF-32": (json.dumps(GOOD).encode("utf-32"), "is not UTF-8"),
    "cut gzip": (gzip.compress(json.dumps(GOOD).encode() * 9)[:-9], "cannot be read to its end"),
    "damaged gzip": (gzip.compress(json.dumps(GOOD).encode())[:20] + b"1234567890", "to its end"),
    "gzip of nothing": (gzip.compress(b""), "has no rows"),
    "deep metadata": (b'{"metadata": "' + b"[" * 9999 + b'"}', "which is no JSON object"),
    "key twice": (b'{"reward": 1, "reward": 2}\n', "'reward' stands twice"),
    "deep input of verl": (
        b'{"input": ' + b"[" * 980 + b"]" * 980 + b', "output": "x", "score": 1}',
        "nested too deeply",
    ),
    "deep nesting": (b"[" * 200_000, "line 1: is nested too deeply"),
    "empty": (b"", "has no rows"),
    "blank lines only": (b"\n \n", "has no rows"),
    "binary": (bytes(range(256)), "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(tmp_path, case):
    content, message = BAD_FILES[case]
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_rollouts(path)
    assert str(path) in str(error.value) and message in str(error.value)
    # One cause is told once, not on every line of the file.
    assert str(error.value).startswith("1 problem ") or case in ("binary", "deep metadata")


def nested(levels):
    """A list in a list, ``levels`` deep."""
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize("limit", [600, 20_000])
@pytest.mark.parametrize("levels", [10, MAX_NESTING - 2, MAX_NESTING - 1, 400])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "slime"])
def test_depth_is_bounded_whatever_the_interpreter_bears(tmp_path, form, levels, limit):
    row = GOOD | {"metadata": {"deep": nested(levels)}}
    held = f"rollouts.{'pt' if form == 'slime' else form}"
    if form == "jsonl":
        write_lines(tmp_path / held, [row])
    elif form == "parquet":
        text = json.dumps(row["metadata"])
        table = pyarrow.Table.from_pylist([row | {"metadata": text}])
        pyarrow.parquet.write_table(table, tmp_path / held)
    else:
        sample = {"tokens": [1, 2, 3], "response_length": 1, "reward": 1.0, "group_index": 0}
        deep = sample | {"metadata": row["metadata"]}
        torch.save({"rollout_id": 0, "samples": [deep]}, tmp_path / held)
    # In a slime file the row lies one level deeper, beside the file's number.
    allowed = levels <= MAX_NESTING - 2 - (form == "slime") + (form == "parquet")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        if allowed:
            assert len(read_rollouts(tmp_path / held)) == 1
        else:
            with pytest.raises(ValueError, match="is nested too deeply, at most 64 levels"):
                read_rollouts(tmp_path / held)
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("kind", ["shared", "cyclic"])
def test_what_a_pickle_shares_is_walked_once(kind):
    """Two references a level would be 2 ** 60 lists; a list in itself has no end."""
    value: list[object] = []
    if kind == "cyclic":
        value.append(value)
        assert "nested too deeply" in nesting_problem(value)
    else:
        for _ in range(MAX_NESTING - 1):
            value = [value, value]
        assert nesting_problem(value) is None
        assert "nested too deeply" in nesting_problem([value])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_missing_file_directory_and_unknown_suffix(tmp_path):
    (tmp_path / "rollouts.csv").write_text("a,b\n")
    paths = [tmp_path / "none.jsonl", tmp_path, tmp_path / "rollouts.csv"]
    with pytest.raises(ValueError) as error:
        read_rollouts(paths)
    text = str(error.value)
    assert "none.jsonl: is missing" in text
    assert f"{tmp_path}: is a directory; name its files" in text
    assert "rollouts.csv: has no known suffix" in text
    with pytest.raises(ValueError, match="paths is empty"):
        read_rollouts([])


def test_parquet_that_is_none_or_cut(tmp_path):
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 100), whole)
    assert len(read_rollouts(whole)[0].samples) == 100
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    none = tmp_path / "none.parquet"
    none.write_bytes(b"")
    text = tmp_path / "text.parquet"
    text.write_text(json.dumps(GOOD))
    for path in (cut, none, text):
        with pytest.raises(ValueError, match=f"{path.name}: is no readable parquet file"):
            read_rollouts(path)
    # Damaged data pages: the footer is whole, so rows are met before the fault.
    raw = bytearray(whole.read_bytes())
    raw[4:60] = bytes(56)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="is no readable parquet file"):
        read_rollouts(damaged)


def test_bad_parquet_row_is_named_and_an_empty_table_refused(tmp_path):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, row_with(reward=None)]), path)
    with pytest.raises(ValueError, match=r"r.parquet, row 1: field 'reward' is missing"):
        read_rollouts(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]).slice(0, 0), path)
    with pytest.raises(ValueError, match="r.parquet: has no rows"):
        read_rollouts(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), path)
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'megatron_pg\[train\]'"):
        read_rollouts(path)


def test_duplicate_sample_ids_name_the_earlier_row(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [row_with(sample_id=i) for i in (1, 2, "1")])
    with pytest.raises(ValueError, match=r"line 3: field 'sample_id' '1' is also .* line 1"):
        read_rollouts(path)


def test_group_ids_on_some_rows_only(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [row_with(group_id="a"), GOOD])
    with pytest.raises(
        ValueError, match="line 2: field 'group_id' must be on every row or on none"
    ):
        read_rollouts(path)


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs", "rollout_logprobs", "advantage"])
def test_optional_field_on_some_rows_of_a_group_only(tmp_path, field):
    path = write_lines(tmp_path / "r.jsonl", [GOOD, row_with(**{field: [-1.0, 0.0]})])
    with pytest.raises(ValueError, match=f"line 2: field '{field}' must be on all rows of a group"):
        read_rollouts(path)


def test_all_problems_are_told_up_to_the_limit(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [row_with(reward="x", prompt_ids=[])] * 9)
    b = write_lines(tmp_path / "b.jsonl", [row_with(zzz=1, status=0)] * 3)
    with pytest.raises(ValueError) as error:
        read_rollouts([a, b])
    lines = str(error.value).splitlines()
    assert lines[0].startswith("24 problems") and lines[-1].strip() == "... and 4 more"
    assert len(lines) == 22
    assert "a.jsonl, line 9: field 'reward'" in str(error.value)
    assert "b.jsonl, line 1: field 'zzz'" in str(error.value)


def test_a_file_is_named_once(tmp_path, monkeypatch):
    write_lines(tmp_path / "r.jsonl", [GOOD])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "r.jsonl")
    monkeypatch.chdir(tmp_path)
    for again in (tmp_path / "r.jsonl", tmp_path / "link.jsonl", tmp_path / "." / "r.jsonl"):
        with pytest.raises(ValueError, match=r"r?i?n?k?.jsonl: is given twice \(as r.jsonl\)"):
            read_rollouts(["r.jsonl", again])


def test_parquet_with_a_column_twice(tmp_path):
    table = pyarrow.Table.from_pylist([GOOD])
    twice = table.append_column("reward", table["reward"])
    pyarrow.parquet.write_table(twice, tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="r.parquet: .*'reward'"):
        read_rollouts(tmp_path / "r.parquet")


def test_text_needs_a_tokenizer_and_eos_one_that_has_it(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [TEXT])
    with pytest.raises(ValueError, match="line 1: field 'prompt' is text, and there is no"):
        read_rollouts(path)
    with pytest.raises(ValueError, match="append_eos=True concerns rows of text"):
        read_rollouts(path, append_eos=True)
    with pytest.raises(ValueError, match="needs a tokenizer with an eos_token_id"):
        read_rollouts(path, tokenizer=Tokenizer(), append_eos=True)


def test_options_that_would_be_ignored_are_refused(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [GOOD])
    with pytest.raises(ValueError, match="format 'jsonl', which does not read reward_key="):
        read_rollouts(path, reward_key="a")
    with pytest.raises(ValueError, match="format='csv' must be one of auto, jsonl"):
        read_rollouts(path, format="csv")


def test_slime_files_that_are_refused(tmp_path):
    sample = {"tokens": [1, 2], "response_length": 1, "reward": 1.0, "status": "completed"}
    saved = {
        "class.pt": ({"samples": [Tokenizer()]}, "does not load as plain data"),
        "list.pt": ([1], "is no slime rollout"),
        "number.pt": ({"samples": [5]}, "sample 0: must be a dict, got int"),
        "none.pt": ({"samples": []}, "has no rows"),
        "long.pt": ({"samples": [sample | {"response_length": 2}]}, r"is 2, must lie in \[0, 2\)"),
        "untyped.pt": (
            {"samples": [sample | {"tokens": "ab"}]},
            "'tokens' is a str, must be a list",
        ),
        "bodiless.pt": (
            {"samples": [sample | {"tokens": [], "response_length": 0, "group_index": 1}]},
            "field 'tokens' is empty, as in all samples of its group; leave the sample out",
        ),
        "huge.pt": (
            {"samples": [sample | {"tokens": [1, 10**300]}]},
            "field 'response_ids' token 0 is 10000000",
        ),
        "removed.pt": (
            {"samples": [sample | {"remove_sample": True, "loss_mask": [1, 1]}]},
            "field 'loss_mask' has 2 values, the response has 1 tokens",
        ),
        "index.pt": ({"samples": [sample | {"group_index": 1.5}]}, "'group_index' must be an int"),
        "bare.pt": ({"samples": [{"tokens": [1, 2]}]}, "'response_length' is missing"),
        "pending.pt": (
            {"samples": [sample | {"status": "pending"}]},
            "field 'status' is 'pending'",
        ),
        "unscored.pt": ({"samples": [sample | {"reward": None}]}, "field 'reward' is missing"),
    }
    for name, (data, message) in saved.items():
        torch.save(data, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            read_rollouts(tmp_path / name)
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ValueError, match="does not load as plain data"):
        read_rollouts(tmp_path / "text.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_lengths": 9}, "field 'input_lengths' is 9, there are 3 token_ids"),
        ({"input_lengths": "3"}, "field 'input_lengths' is a str"),
        ({"token_loss_mask": [0, 0, 0]}, "trains no token"),
        ({"token_loss_mask": None}, "field 'token_loss_mask' is missing"),
        ({"token_loss_mask": [1, 1, 1]}, "field 'prompt_ids' has no tokens"),
        ({"token_loss_mask": [0, 0.5, 1]}, "value 0 is 0.5"),
        ({"rewards": None}, "field 'reward' is missing"),
        ({"prev_logprobs": [0, 1.0, 0]}, "field 'old_logprobs' value 0 is 1.0"),
    ],
)
def test_nemo_rl_rows_that_are_refused(tmp_path, change, message):
    record = {
        "input_lengths": 3,
        "token_ids": [1, 2, 3],
        "token_loss_mask": [0, 1, 1],
        "rewards": 1.0,
    }
    path = write_lines(tmp_path / "train_data_step1.jsonl", [record | change])
    with pytest.raises(ValueError, match="line 1: .*" + message):
        read_rollouts(path)


def test_the_written_schema_lists_every_field():
    words = set(schema.__doc__.replace("``", " ").replace(",", " ").split())
    assert schema.FIELDS.keys() <= words
