"""Prompts files as they should not be, in every form; see ``tests.hostile``.

A generator writes prompts that it knows, in forms that must not matter, and into half of the inputs
one fault. What is read must be those prompts, or the fault must be named.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_pg.rollout import FilePrompts
from tests.hostile import assert_both_occur, refused, seeds

from .test_prompts import ChatTokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
WORDS = (
    "1 + 1",
    "ß\u2028ö",
    "{question}",
    "日本",
    "a\tb",
    "{{x}}",
    "</s>",
    "x" * 90,
    "\\frac{1}{2}",
)

ROW_FAULTS: dict[str, Any] = {
    "null": None,
    "number": 3,
    "flag": True,
    "empty": "",
    "blank": "\n \u2003",
    "object": {"role": "user", "content": "1"},
    "no messages": [],
    "text in a list": ["1"],
    "no content": [{"role": "user"}],
    "other role": [{"role": "root", "content": "1"}],
    "content a number": [{"role": "user", "content": 1}],
    "half a pair": "a\udc00b",
}
FILE_FAULTS: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"q": "a", ', "line 1: is no JSON"),
    "UTF-16": ('{"q": "a"}\n'.encode("utf-16"), "line 1"),
    "latin": (b'{"q": "\xe9"}\n', "line 1: is not UTF-8"),
    "number": (b"3\n", "line 1: must be an object"),
    "nested": (b'{"q": ' + b"[" * 20_000, "line 1: is nested too deeply"),
    "twice": (b'{"q": "a", "q": "b"}\n', "line 1: is no JSON: the key 'q' stands twice"),
    "nothing": (b"\n\n", "has no rows"),
}


@dataclass
class Made:
    """An input: files, the prompts that it holds, and what is wrong with it."""

    files: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    fault: tuple[str, ...] | None = None


def make(seed: int, folder: Path) -> Made:
    rng, made = random.Random(seed), Made()
    folder.mkdir(parents=True, exist_ok=True)
    num_files, is_chat = rng.randint(1, 3), rng.random() < 0.5
    spoilt = rng.randrange(num_files) if rng.random() < 0.5 else None
    for number in range(num_files):
        path = folder / f"{number}{rng.choice(SUFFIXES)}"
        rows = [_row(rng, made, is_chat) for _ in range(rng.randint(1, 5))]
        made.files.append(str(path))
        if number != spoilt:
            _write(rng, path, rows)
        elif rng.random() < 0.5 and path.suffix != ".parquet":
            _spoil_row(rng, made, path, rows)
        else:
            path = path.with_name(f"{number}.jsonl")
            made.files[-1] = str(path)
            content, told = FILE_FAULTS[rng.choice(sorted(FILE_FAULTS))]
            path.write_bytes(content)
            made.fault = (str(path), told)
    return made


def _row(rng: random.Random, made: Made, is_chat: bool) -> dict[str, Any]:
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
    answer = rng.choice([str(rng.randint(0, 9)), words])
    made.answers.append(answer)
    made.texts.append(f"<user>{words}<assistant>")
    prompt = [{"role": "user", "content": words}] if is_chat else words
    return {"q": prompt, "a": {"b": answer}, "other": rng.choice(["x", None])}


def _write(rng: random.Random, path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        return
    is_ascii = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    if ".json" in path.suffixes and rng.random() < 0.7:
        text = "[" + rng.choice([",", " ,\n"]).join(lines) + "]"
    else:
        text = rng.choice(["\n", "\r\n", "\n\n"]).join(lines) + rng.choice(["", "\n"])
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _spoil_row(rng: random.Random, made: Made, path: Path, rows: list[dict[str, Any]]) -> None:
    row = rng.choice(rows)
    if rng.random() < 0.3:
        row["a"] = rng.choice([None, {}, {"b": None}, "b"])
        made.fault = (str(path), "field 'a.b'", "answer_key names it")
    elif rng.random() < 0.2:
        del row["q"]
        made.fault = (str(path), "field 'q' is missing; prompt_key")
    else:
        row["q"] = ROW_FAULTS[rng.choice(sorted(ROW_FAULTS))]
        made.fault = (str(path), "field 'q'")
    # Half a pair has no UTF-8 form: JSON escapes it.
    lines = "".join(json.dumps(one) + "\n" for one in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("seed", seeds())
def test_prompts_are_those_of_the_files_or_the_fault_is_named(seed: int, tmp_path: Path) -> None:
    made = make(seed, tmp_path)
    settings: dict[str, Any] = {"prompt_key": "q", "answer_key": "a.b", "shuffle": False}
    if made.fault is not None:
        with refused("1 problem in the prompts", *made.fault):
            FilePrompts(made.files, tokenizer=ChatTokenizer(), **settings)
        return
    read = FilePrompts(made.files, tokenizer=ChatTokenizer(), **settings)
    found = read.prompts(0, len(read))
    assert [prompt.text for prompt in found] == made.texts
    assert [prompt.metadata["answer"] for prompt in found] == made.answers
    assert [prompt.metadata["other"] for prompt in found].count("x") <= len(found)
    assert len({prompt.prompt_id for prompt in found}) == len(found)


def test_the_family_holds_good_and_bad_inputs(tmp_path: Path) -> None:
    made = [make(seed, tmp_path / str(seed)) for seed in range(60)]
    assert_both_occur([one.fault is None for one in made])
    suffixes = {Path(file).suffix for one in made for file in one.files}
    assert suffixes == {".jsonl", ".gz", ".json", ".parquet"}
    assert {"field 'q'", "field 'a.b'"} <= {part for one in made for part in one.fault or ()}
