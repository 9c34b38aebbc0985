"""Prompts from files: forms of rows and files, order, identity, limits, refusals."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_pg.rollout import (
    FilePrompts,
    GroupStream,
    HoldsOut,
    Prompt,
    PromptSource,
    RolloutSource,
    SampledRollouts,
    SamplingParams,
)
from tests.hostile import refused

from .helpers import CharTokenizer, make_response


class ChatTokenizer(CharTokenizer):
    """With a template, which a tokenizer of characters has none of."""

    chat_template = "present"

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        if any(turn["role"] == "tool" for turn in conversation):
            raise ValueError("no tools here")
        return super().apply_chat_template(conversation, **kwargs)


def write(path: Path, rows: Sequence[Any]) -> str:
    """The rows in the form that the name asks for."""
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return str(path)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = (json.dumps(rows, indent=1) if ".json" in path.suffixes else lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def prompts(*files: str, chat: bool = True, **settings: Any) -> FilePrompts:
    tokenizer = ChatTokenizer() if chat else CharTokenizer()
    return FilePrompts(files, tokenizer=tokenizer, **{"shuffle": False, **settings})


def texts(found: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in found]


QUESTIONS = [{"question": f"what is {i}?", "answer": str(i), "n": i} for i in range(7)]
MESSAGES = [
    {
        "data_source": "sums",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{i}?"},
        ],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i},
    }
    for i in range(3)
]
NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_form_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    made = prompts(write(tmp_path / name, QUESTIONS), prompt_key="question", answer_key="answer")
    found = made.prompts(0, 7)
    assert texts(found) == [f"<user>what is {i}?<assistant>" for i in range(7)]
    assert [dict(prompt.metadata) for prompt in found] == QUESTIONS
    assert all(p.prompt_ids.tolist() == [ord(char) for char in p.text] for p in found)
    assert all(p.messages is None and p.prompt_id.startswith(str(tmp_path / name)) for p in found)
    assert len(made) == 7 and str(made) == "prompts: 7 from 1 file"


@pytest.mark.parametrize("name", NAMES)
def test_verls_columns_are_found_by_themselves(name: str, tmp_path: Path) -> None:
    found = prompts(write(tmp_path / name, MESSAGES)).prompts(0, 3)
    assert texts(found) == [f"<system>Be brief.<user>{i}?<assistant>" for i in range(3)]
    for row, prompt in zip(MESSAGES, found):
        assert dict(prompt.metadata) == {**row, "answer": row["reward_model"]["ground_truth"]}
        assert prompt.messages == row["prompt"]


def test_a_key_may_lie_within_a_column(tmp_path: Path) -> None:
    rows = [{"item": {"q": "a?", "key": 1}}, {"item.q": "b?", "item": {"q": "c?", "key": 2}}]
    made = prompts(write(tmp_path / "a.jsonl", rows), prompt_key="item.q", answer_key="item.key")
    found = made.prompts(0, 2)
    assert texts(found) == ["<user>a?<assistant>", "<user>b?<assistant>"]
    assert [prompt.metadata["answer"] for prompt in found] == [1, 2]


@pytest.mark.parametrize("chat", [True, False])
def test_template_and_system_prompt_go_around_text(chat: bool, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "1 {question} 2"}])
    settings = {"template": "Q: {question}!", "system_prompt": "Be brief."}
    (prompt,) = prompts(file, chat=chat, **settings).prompts(0, 1)
    asked = "Q: 1 {question} 2!"
    want = f"<system>Be brief.<user>{asked}<assistant>" if chat else f"Be brief.\n{asked}"
    assert (prompt.text, prompt.messages) == (want, None)


def test_a_system_prompt_begins_a_chat_that_has_none(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1?", "name": None}]
    file = write(tmp_path / "a.jsonl", [{"prompt": chat}])
    (prompt,) = prompts(file, system_prompt="Be brief.").prompts(0, 1)
    assert prompt.text == "<system>Be brief.<user>1?<assistant>"
    assert prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
    ], "what TRL's rewards are given; fields that are null are none"


def test_every_epoch_has_every_prompt_once_in_its_own_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": f"{i}?"} for i in range(20)])
    made = prompts(file, shuffle=True, seed=3)
    first, second = made.prompts(0, 20), made.prompts(20, 20)
    assert sorted(texts(first)) == sorted(texts(second)) and texts(first) != texts(second)
    assert len({prompt.prompt_id for prompt in first + second}) == 40
    assert all(prompt.prompt_id.endswith("#1") for prompt in second)
    assert texts(made.prompts(13, 14)) == texts(first + second)[13:27], "asked in any order"
    assert texts(prompts(file, shuffle=True, seed=3).prompts(0, 20)) == texts(first)
    assert texts(prompts(file, shuffle=True, seed=4).prompts(0, 20)) != texts(first)
    assert texts(prompts(file).prompts(18, 4)) == [f"<user>{i}?<assistant>" for i in (18, 19, 0, 1)]


def test_equal_prompts_have_ids_of_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "1?"}] * 3)
    found = prompts(file).prompts(0, 3)
    assert len(set(texts(found))) == 1 and len({prompt.prompt_id for prompt in found}) == 3


def test_patterns_and_folders_give_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / ".hidden").mkdir()
    for name in ("b.jsonl", "a.parquet", "deep/c.json.gz", ".hidden/d.jsonl", "e.txt"):
        if name.endswith("txt"):
            (tmp_path / "data" / name).write_text("no rows")
        else:
            write(tmp_path / "data" / name, [{"prompt": Path(name).name[0]}])
    of_folder = texts(prompts(str(tmp_path / "data")).prompts(0, 3))
    assert of_folder == [f"<user>{name}<assistant>" for name in "abc"]
    of_pattern = prompts(str(tmp_path / "data" / "**" / "*.json*"))
    assert texts(of_pattern.prompts(0, 2)) == [f"<user>{name}<assistant>" for name in "bc"]
    assert len(of_pattern) == 2
    odd = write(tmp_path / "a[1].jsonl", [{"prompt": "odd"}])
    assert len(prompts(odd)) == 1, "a name may hold the signs of a pattern"


def test_a_link_to_a_folder_within_a_folder_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "data" / "a.jsonl", [{"prompt": "1?"}])
    write(tmp_path / "elsewhere" / "b.jsonl", [{"prompt": "2?"}])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="more: is a link to a folder.*name the folder"):
        prompts(str(tmp_path / "data"))
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(prompts(str(tmp_path / "linked"))) == 1, "one that is named is followed"


LENGTHS = [4, 30, 6, 31, 5]


@pytest.mark.parametrize("limit", [30, 29, 31, 4])
def test_too_long_prompts_are_refused_or_left_out_and_counted(limit: int, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "x" * length} for length in LENGTHS])
    kept = [length for length in LENGTHS if length <= limit]
    settings: dict[str, Any] = {"chat": False, "max_prompt_tokens": limit, "limit": "the limit"}
    made = prompts(file, too_long="leave_out", **settings)
    assert [len(prompt.prompt_ids) for prompt in made.prompts(0, len(made))] == kept
    told = f"{len(kept)} from 1 file, {5 - len(kept)} left out for more than {limit} tokens"
    assert str(made) == f"prompts: {told}"
    if len(kept) == 5:
        prompts(file, **settings)
        return
    line = next(i for i, length in enumerate(LENGTHS, start=1) if length > limit)
    with refused(
        f"{5 - len(kept)} problem", f"{file}, line {line}: has {LENGTHS[line - 1]} tokens, the",
        f"limit allows {limit}; shorten it, or set too_long to leave_out",
    ):  # fmt: skip
        prompts(file, **settings)


def test_what_becomes_of_long_prompts_is_known(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with refused("too_long='drop' must be one of refuse, leave_out"):
        prompts(file, chat=False, too_long="drop")


def test_none_that_is_short_enough_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "xxxxx"}])
    with refused(file, "all prompts are too long: 0 from 1 file, 1 left out"):
        prompts(file, chat=False, max_prompt_tokens=4, too_long="leave_out")


def test_held_out_prompts_are_those_of_their_files_in_order(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"prompt": f"{i}?"} for i in range(9)])
    val = write(tmp_path / "v.jsonl", [{"prompt": f"val {i}?"} for i in range(3)])
    made = prompts(train, val_files=[val], shuffle=True)
    held_out = made.held_out()
    assert isinstance(made, HoldsOut) and isinstance(held_out, PromptSource) and len(held_out) == 3
    found = held_out.prompts(0, 4)
    assert texts(found) == [f"<user>val {i}?<assistant>" for i in (0, 1, 2, 0)]
    assert len({prompt.prompt_id for prompt in found}) == 4
    assert str(made) == "prompts: 9 from 1 file; held out: 3 from 1 file"
    with pytest.raises(ValueError, match=r"name some in rollout\.prompts\.val_files"):
        prompts(train).held_out()
    with refused(train, "is among files and val_files"):
        prompts(train, val_files=[val, train])


def test_memory_holds_rows_in_the_size_of_their_text(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 300, "answer": str(i), "extra_info": {"i": i}} for i in range(2000)]
    file = write(tmp_path / "a.jsonl", rows)
    made = prompts(file)
    held = len(made._train.rows._bytes)
    assert held < 1.6 * Path(file).stat().st_size


class Echo(RolloutSource):
    def generate(self, prompts: Any, params: Any) -> Any:
        return [tuple(make_response("a") for _ in range(params.num_generations)) for _ in prompts]


def stream(made: FilePrompts) -> SampledRollouts:
    params = SamplingParams(num_generations=2, max_response_tokens=4)
    return SampledRollouts(made, Echo(), lambda prompt, response: 1.0, params)


def test_a_stream_goes_on_within_an_epoch_and_says_what_it_reads(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", QUESTIONS)
    settings: dict[str, Any] = {"prompt_key": "question", "shuffle": True, "seed": 5}
    whole, stopped = stream(prompts(file, **settings)), stream(prompts(file, **settings))
    assert isinstance(whole, GroupStream) and whole.start() == "prompts: 7 from 1 file"
    expected = [group.group_id for group in whole.next_groups(12)]
    stopped.next_groups(5)
    state = json.loads(json.dumps(stopped.state_dict()))
    elsewhere = write(tmp_path / "moved.jsonl", QUESTIONS)
    resumed = stream(prompts(elsewhere, **settings))
    resumed.load_state_dict(state)
    moved = [group.group_id.replace(elsewhere, file) for group in resumed.next_groups(7)]
    assert moved == expected[5:]


CHANGES: dict[str, dict[str, Any]] = {
    "content": {"rows": QUESTIONS[:6] + [{**QUESTIONS[6], "answer": "8"}]},
    "content by order": {"rows": QUESTIONS[::-1]},
    "content by template": {"template": "Q: {question}"},
    "content by system prompt": {"system_prompt": "Be brief."},
    "content by answer": {"answer_key": "n"},
    "num_prompts": {"rows": QUESTIONS[:6]},
    "seed": {"seed": 6},
    "shuffle": {"shuffle": False},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_prompts_or_another_order_are_not_resumed(change: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"prompt_key": "question", "answer_key": "answer", "seed": 5}
    base |= {"shuffle": True}
    first = stream(prompts(write(tmp_path / "a.jsonl", QUESTIONS), **base))
    first.next_groups(3)
    settings = {**base, **CHANGES[change]}
    other = write(tmp_path / "b.jsonl", settings.pop("rows", QUESTIONS))
    second = stream(prompts(other, **settings))
    with refused("the saved rollout state is of", change.split()[0], "resume with the files and"):
        second.load_state_dict(first.state_dict())
    with refused("num_prompts", "which these rollouts do not know"):
        stream_of_a_task().load_state_dict(first.state_dict())
    with refused("the saved rollout state is of num_prompts=None"):
        second.load_state_dict(stream_of_a_task().state_dict())


def stream_of_a_task() -> SampledRollouts:
    class Task:
        def prompts(self, start: int, count: int) -> list[Prompt]:
            raise AssertionError("nothing is asked for")

    params = SamplingParams(num_generations=2, max_response_tokens=4)
    return SampledRollouts(Task(), Echo(), lambda prompt, response: 1.0, params)


GOOD = {"prompt": "1?", "answer": 1}
BAD_ROWS: dict[str, tuple[Any, str, str]] = {
    "no prompt": ({"answer": 1}, "prompt", "is missing; prompt_key names the column"),
    "null prompt": ({"prompt": None}, "prompt", "is null"),
    "empty": ({"prompt": ""}, "prompt", "is an empty string"),
    "blank": ({"prompt": " \n"}, "prompt", "is blank"),
    "number": ({"prompt": 3}, "prompt", "must be a string or a list of chat messages, got int"),
    "no messages": ({"prompt": []}, "prompt", "must be a string or a list of chat messages"),
    "no role": ({"prompt": [{"content": "1?"}]}, "prompt", "message 0 must be an object with"),
    "other role": ({"prompt": [{"role": "me", "content": "1?"}]}, "prompt", "has role 'me'"),
    "image": ({"prompt": [{"role": "user", "content": [{}]}]}, "prompt", "has no text under"),
    "refused": ({"prompt": [{"role": "tool", "content": "1"}]}, "prompt", "no tools here"),
    "half a pair": ({"prompt": "\ud800"}, "prompt", "half a surrogate pair, '\\ud800'"),
    "source": ({"prompt": "1?", "data_source": 3}, "data_source", "must be text, got 3"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_and_column(kind: str, tmp_path: Path) -> None:
    row, column, message = BAD_ROWS[kind]
    file = write(tmp_path / "a.jsonl", [GOOD, row, GOOD])
    with refused("1 problem in the prompts", f"{file}, line 2: field {column!r}", message):
        prompts(file)


def test_columns_of_images_without_images_are_let_pass(tmp_path: Path) -> None:
    row = {"prompt": "1?", "image": None, "images": [], "videos": ""}
    (one,) = prompts(write(tmp_path / "a.jsonl", [row])).prompts(0, 1)
    assert one.metadata == row


# As data sets for fine-tuning have it.
ANSWERED = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "1?"}, {"answer_key": "answer"}, "field 'answer' is missing; answer_key names"),
        ({"prompt": "1?", "answer": None}, {"answer_key": "answer"}, "field 'answer' is null"),
        ({"prompt": "1?", "a": {}}, {"answer_key": "a.b"}, "field 'a.b' is missing"),
        (MESSAGES[0], {"template": "Q: {question}"}, "which template does not concern"),
        ({"prompt": "1?", "images": [{"bytes": "a"}]}, {}, "'images' is not read, as prompts are"),
        ({"prompt": "1?", "image": "a.png"}, {}, "field 'image' is not read"),
        ({"prompt": ANSWERED}, {}, "'prompt' ends with the assistant's message; leave out what"),
        (MESSAGES[0], {"system_prompt": "a"}, "begins with a system message; leave system_prompt"),
        (MESSAGES[0], {"chat": False}, "the tokenizer has no chat template"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_a_row(
    row: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [row])
    with refused(f"{file}, line 1:", message):
        prompts(file, **settings)


def test_answers_are_in_every_row_or_in_none(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*MESSAGES, {"prompt": "1?"}])
    with refused(f"{file}, line 4: field 'reward_model' must be in every row", f"{file}, line 1"):
        prompts(file)


def test_problems_of_all_files_are_told_at_once_and_no_more_than_twenty(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": ""}] * 15)
    second = write(tmp_path / "b.parquet", [{"text": "1?"}] * 15)
    missing, empty = str(tmp_path / "c.jsonl"), write(tmp_path / "d.json", [])
    with refused("32 problems", f"{first}, line 15", f"{second}, row 3", "... and 12 more"):
        prompts(first, second, missing, empty)
    with refused("2 problems", f"{missing}: is missing", f"{empty}: has no rows"):
        prompts(missing, empty)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("none/*.jsonl", "matches no file"),
        (".", "holds no file of a known suffix (.jsonl, .jsonl.gz, .json, .json.gz, .parquet)"),
        ("a.csv", "has no known suffix"),
        ("b.json", "is no JSON"),
        ("c.json", "item 1: must be an object, got a JSON int"),
        ("d.json", "is nested too deeply"),
        ("e.json", "is not UTF-8 (byte 13)"),
        ("f.json", "the key 'prompt' stands twice"),
        ("g.jsonl", "line 1: must be an object, got a JSON list"),
        ("h.parquet", "is no readable parquet file"),
        ("i.jsonl.gz", "cannot be read to its end"),
    ],
)
def test_bad_files(entry: str, message: str, tmp_path: Path) -> None:
    contents: dict[str, bytes] = {
        "a.csv": b"prompt\n1?\n",
        "b.json": b'[{"prompt": "1?"},',
        "c.json": b'[{"prompt": "1?"}, 3]',
        "d.json": b"[" * 100_000,
        "e.json": b'[{"prompt": "\xff"}]',
        "f.json": b'[{"prompt": "1?", "prompt": "2?"}]',
        "g.jsonl": b'[{"prompt": "1?"}]',
        "h.parquet": b"PAR1 and no more",
        "i.jsonl.gz": gzip.compress(b'{"prompt": "1?"}\n' * 99)[:-9],
    }
    if entry in contents:
        (tmp_path / entry).write_bytes(contents[entry])
    with refused(tmp_path / entry if entry != "." else tmp_path, message):
        prompts(str(tmp_path / entry))


def test_a_file_is_named_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [GOOD])
    with refused(file, "is named twice", "name it once"):
        prompts(file, str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match="must contain {question}"):
        prompts(file, template="no place")
