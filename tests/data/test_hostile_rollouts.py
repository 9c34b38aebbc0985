"""Recorded rollouts as they should not be, in every format; see ``tests.hostile``.

A generator writes samples that it knows, in forms that must not matter, and into half of the inputs
one fault. What is read must be those samples in those groups, or the fault must be named.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_pg.data import read_rollouts
from tests.hostile import assert_both_occur, refused, seeds

VOCAB = 100
BOS, EOS = 1, 2


@dataclass
class Known:
    """A sample as it has to be read; nothing of it is trained when ``status`` is aborted."""

    prompt: list[int]
    response: list[int]
    reward: float
    mask: list[bool]
    logprobs: list[float] | None
    group: Any
    status: str = "completed"
    execution: Any = None

    def abort(self, is_empty: bool) -> None:
        self.status, self.logprobs = "aborted", None
        self.response = [] if is_empty else self.response
        self.mask = [False] * len(self.response)


@dataclass
class Input:
    """Files, the samples of each in order, and the names in the refusal that is due."""

    rng: random.Random
    samples: list[list[Known]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, ...] | None = None

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def make_input(seed: int, *, has_executions: bool = False) -> Input:
    """Up to three files whose group ids start anew, with the odd response that trains nothing."""
    made = Input(random.Random(seed))
    rng = made.rng
    for _ in range(made.pick(1, 1, 2, 3)):
        samples = []
        carries_logprobs = made.chance(0.5)
        for group in range(rng.randint(1, 3)):
            # Distinct within a file, so that prompts make the same groups as ids.
            prompt = [5, 10 + group, *(rng.randrange(VOCAB) for _ in range(rng.randint(0, 3)))]
            for number in range(rng.randint(1, 4)):
                response = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))]
                logprobs = [-rng.random() * made.pick(1, 30, 999) for _ in response]
                samples.append(
                    Known(
                        prompt,
                        response,
                        made.pick(0.0, 1.0, -0.5, 1e-300, rng.random()),
                        [made.chance(0.8) for _ in response],
                        logprobs if carries_logprobs else None,
                        group,
                    )
                )
                if has_executions and number and made.chance(0.3):
                    samples[-1].reward = samples[-2].reward
                    samples[-2].execution = samples[-2].execution or f"{group}.{number}"
                    samples[-1].execution = samples[-2].execution
        if samples[0].status == "completed" and made.chance(0.3):
            rng.choice(samples).abort(made.chance(0.5))
        made.samples.append(samples)
    return made


def assert_read(made: Input, paths: list[Path], **options: Any) -> None:
    """What the files hold is what was written into them."""
    groups = read_rollouts(paths, **options, **made.options)
    want: dict[Any, list[Known]] = {}
    for number, samples in enumerate(made.samples):
        for sample in samples:
            want.setdefault((number, sample.group), []).append(sample)
    assert len({g.group_id for g in groups}) == len(groups) == len(want)
    for group, known in zip(groups, want.values()):
        executions = [i if s.execution is None else s.execution for i, s in enumerate(known)]
        assert group.executions.tolist() == [
            list(dict.fromkeys(executions)).index(e) for e in executions
        ]
        assert len(group.samples) == len(known)
        for got, sample in zip(group.samples, known):
            assert got.prompt_ids.tolist() == sample.prompt
            assert got.response_ids.tolist() == sample.response
            assert got.loss_mask.tolist() == sample.mask and got.status == sample.status
            assert got.status == "aborted" or got.reward == sample.reward
            if any(sample.mask):
                carried = got.rollout_logprobs
                assert (None if carried is None else carried.tolist()) == sample.logprobs


def settle(made: Input, paths: list[Path], **options: Any) -> None:
    """The one or the other; a fault that is read is silently wrong."""
    if made.fault is None:
        assert_read(made, paths, **options)
    else:
        with refused(*made.fault):
            read_rollouts(paths, **options, **made.options)


# --- our own format ------------------------------------------------------------------------------


def own_row(made: Input, sample: Known, has_ids: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_ids": sample.prompt,
        "response_ids": sample.response,
        "reward": sample.reward,
        "loss_mask": made.pick(sample.mask, [int(flag) for flag in sample.mask]),
        "rollout_logprobs": sample.logprobs,
        "execution_id": sample.execution,
    }
    if has_ids:
        row["group_id"] = sample.group
    if sample.status == "aborted":
        # An empty response says by itself that it is one; of an aborted one all else is ignored.
        row |= {"reward": made.pick(None, 5.0), "loss_mask": [1] * len(sample.response)}
        if sample.response or made.chance(0.5):
            row["status"] = "aborted"
    elif sample.reward in (0, 1):
        row["reward"] = made.pick(sample.reward, int(sample.reward), bool(sample.reward))
    if made.chance(0.2):
        row["metadata"] = made.pick(None, {}, {"a": [None, {"b": "\u2028"}]}, '{"a": NaN}')
    return row


Fault = tuple[str, Callable[[dict[str, Any]], Any]]


def at(values: Any, place: int, value: Any) -> list[Any]:
    changed = list(values)
    changed[place % len(changed)] = value
    return changed


# field that is named, new value of it from the row
ROW_FAULTS: dict[str, Fault] = {
    "beyond the vocabulary": ("response_ids", lambda r: at(r["response_ids"], 1, VOCAB)),
    "negative": ("prompt_ids", lambda r: at(r["prompt_ids"], 0, -1)),
    "no integer": ("response_ids", lambda r: at(r["response_ids"], 2, 7.0)),
    "flags": ("prompt_ids", lambda r: [True, False]),
    "text": ("response_ids", lambda r: "1 2 3"),
    "nested": ("response_ids", lambda r: [r["response_ids"]]),
    "null token": ("prompt_ids", lambda r: at(r["prompt_ids"], 1, None)),
    "beyond 64 bits": ("prompt_ids", lambda r: at(r["prompt_ids"], 1, 2**64)),
    "no prompt": ("prompt_ids", lambda r: []),
    "prompt null": ("prompt_ids", lambda r: None),
    "response null": ("response_ids", lambda r: None),
    "reward null": ("reward", lambda r: None),
    "reward nan": ("reward", lambda r: math.nan),
    "reward infinite": ("reward", lambda r: -math.inf),
    "reward text": ("reward", lambda r: "1.0"),
    "reward list": ("reward", lambda r: [1.0]),
    "mask short": ("loss_mask", lambda r: [1] * (len(r["response_ids"]) - 1)),
    "mask of halves": ("loss_mask", lambda r: [0.5] * len(r["response_ids"])),
    "logprobs long": ("rollout_logprobs", lambda r: [-1.0] * (len(r["response_ids"]) + 1)),
    "logprob above": ("rollout_logprobs", lambda r: [0.01] * len(r["response_ids"])),
    "placeholder": ("rollout_logprobs", lambda r: [-9999.0] * len(r["response_ids"])),
    "logprob nan": ("old_logprobs", lambda r: [math.nan] * len(r["response_ids"])),
    "logprob null": ("ref_logprobs", lambda r: [None] * len(r["response_ids"])),
    "advantage infinite": ("advantage", lambda r: math.inf),
    "status": ("status", lambda r: "finished"),
    "group point": ("group_id", lambda r: 0.5),
    "execution list": ("execution_id", lambda r: [1]),
    "metadata": ("metadata", lambda r: "[1]"),
    "unknown": ("uid", lambda r: 3),
    "near": ("response_id", lambda r: [3]),
}


def spoil(made: Input, rows: list[list[dict[str, Any]]], files: list[Path], place: str) -> None:
    """One fault in a row that trains something."""
    number = made.rng.randrange(len(rows))
    living = [i for i, s in enumerate(made.samples[number]) if s.status != "aborted"]
    if not living:
        return
    where = made.rng.choice(living)
    name, change = ROW_FAULTS[made.rng.choice(sorted(ROW_FAULTS))]
    row = rows[number][where]
    row[name] = change(row)
    made.fault = (f"{files[number]}, {place} {where + (place == 'line')}: field {name!r}",)


def spoil_pair(
    made: Input, rows: list[list[dict[str, Any]]], files: list[Path], place: str
) -> None:
    """A row that contradicts an earlier one of its group."""
    number = made.rng.randrange(len(rows))
    trained = [i for i, s in enumerate(made.samples[number]) if any(s.mask)]
    groups = [made.samples[number][i].group for i in trained]
    if len(set(groups)) == len(groups):
        return
    where = next(i for i, g in zip(trained, groups) if groups.count(g) > 1)
    again = trained[groups.index(made.samples[number][where].group) + 1]
    first, second = rows[number][where], rows[number][again]
    kinds = ["sample_id", "rollout_logprobs", "execution_id"]
    name = made.rng.choice(kinds + ["group_id", "group_id of all"] * ("group_id" in second))
    if name == "sample_id":
        first[name] = second[name] = "same"
        first["execution_id"] = None
    elif name == "rollout_logprobs":
        count = len(second["response_ids"])
        second[name] = None if second[name] is not None else [-1.0] * count
    elif name == "execution_id":
        first[name] = second[name] = "same"
        second["reward"] = float(first["reward"]) + 1
    elif name == "group_id":
        second["prompt_ids"] = [6, *second["prompt_ids"][1:]]
    else:
        name = "group_id"
        second[name] = None
    made.fault = (f"{files[number]}, {place} {again + (place == 'line')}: field {name!r}",)


def jsonl_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_executions=True)
    has_ids = made.chance(0.6)
    suffix = made.pick(".jsonl", ".json", ".jsonl.gz")
    files = [folder / f"step{i}{suffix}" for i in range(len(made.samples))]
    rows = [[own_row(made, s, has_ids) for s in samples] for samples in made.samples]
    if made.chance(0.4):
        made.pick(spoil, spoil, spoil_pair)(made, rows, files, "line")
    for number, file in enumerate(files):
        end, mark = made.pick("\n", "\r\n"), made.pick(b"", b"", b"\xef\xbb\xbf")
        lines = [json.dumps(row, ensure_ascii=made.chance(0.5)) for row in rows[number]]
        content = mark + (end.join(lines) + made.pick("", end, 2 * end)).encode()
        if made.fault is None and made.chance(0.2):
            content, told = made.rng.choice(FILE_FAULTS)(content)
            made.fault = (str(file), told)
        if suffix.endswith("gz") and made.chance(0.8):
            content = gzip.compress(content)
            if made.fault is None and made.chance(0.2):
                content = content[: -made.rng.randint(1, len(content) - 3)]
                made.fault = (str(file), "cannot be read to its end")
        file.write_bytes(content)
    if made.fault is None and made.chance(0.1):
        files.append(files[0])
        made.fault = (str(files[0]), "is given twice")
    return made, files


FILE_FAULTS: list[Callable[[bytes], tuple[bytes, str]]] = [
    lambda c: (c[: c.rindex(b"}")], "is no JSON"),
    lambda c: (c.replace(b"{", b'{"reward": 3, ', 1), "'reward' stands twice"),
    lambda c: (b"[" + c.strip().replace(b"\n", b",") + b"]", "one object a line"),
    lambda c: (b"[\n" + c + b"]\n", "one object a line"),
    lambda c: (c.decode("utf-8-sig").encode("utf-16"), "is not UTF-8"),
    lambda c: (c.decode("utf-8-sig").encode("utf-32-be"), "is not UTF-8"),
    lambda c: (c.rstrip() + b"\n\xff\n", "is not UTF-8"),
    lambda c: (c.rstrip() + b"\n" + b'{"a":' * 50_000, "nested too deeply"),
    lambda c: (c.rstrip() + b'\n"text"\n', "must be an object"),
    lambda c: (b"", "has no rows"),
    lambda c: (b"\n\n", "has no rows"),
]


@pytest.mark.parametrize("seed", seeds())
def test_jsonl(seed: int, tmp_path: Path) -> None:
    made, files = jsonl_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


IDS = [
    pyarrow.list_(pyarrow.int64()),
    pyarrow.list_(pyarrow.int32()),
    pyarrow.list_(pyarrow.uint16()),
    pyarrow.large_list(pyarrow.int64()),
]


def parquet_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_executions=True)
    has_ids = made.chance(0.6)
    files = [folder / f"step{i}.parquet" for i in range(len(made.samples))]
    rows = [[one_type(own_row(made, s, has_ids)) for s in samples] for samples in made.samples]
    clean = copy.deepcopy(rows)
    if made.chance(0.5):
        made.pick(spoil, spoil, spoil_pair)(made, rows, files, "row")
    for number, file in enumerate(files):
        try:
            table = pyarrow.Table.from_pylist(uniform(rows[number]))
        except (pyarrow.ArrowException, OverflowError):
            # A column cannot hold the fault.
            made.fault = None
            table = pyarrow.Table.from_pylist(uniform(clean[number]))
        if made.fault is None and made.chance(0.5):
            for name in ("prompt_ids", "response_ids"):
                place = table.column_names.index(name)
                table = table.set_column(place, name, table[name].cast(made.pick(*IDS)))
        if made.chance(0.3):
            index = pyarrow.array(range(table.num_rows))
            table = table.append_column("__index_level_0__", index)
        if has_ids and made.fault is None and made.chance(0.3):
            place = table.column_names.index("group_id")
            table = table.set_column(
                place, "group_id", table["group_id"].cast(pyarrow.string()).dictionary_encode()
            )
        pyarrow.parquet.write_table(table, file, row_group_size=made.pick(1, 2, 100))
        if made.fault is None and made.chance(0.15):
            content = file.read_bytes()
            file.write_bytes(content[: made.rng.randrange(len(content))])
            made.fault = (str(file), "is no readable parquet file")
    return made, files


def one_type(row: dict[str, Any]) -> dict[str, Any]:
    """The row with values that its column can hold beside those of other rows."""
    return row | {
        "metadata": None if row.get("metadata") is None else "{}",
        "loss_mask": [int(flag) for flag in row["loss_mask"]],
        "reward": None if row["reward"] is None else float(row["reward"]),
    }


def uniform(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with every column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


@pytest.mark.parametrize("seed", seeds())
def test_parquet(seed: int, tmp_path: Path) -> None:
    made, files = parquet_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


# --- slime ---------------------------------------------------------------------------------------

# field that is named, changes of the sample
SLIME_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "length beyond": ("response_length", lambda s: {"response_length": len(s["tokens"])}),
    "length negative": ("response_length", lambda s: {"response_length": -1}),
    "length text": ("response_length", lambda s: {"response_length": "3"}),
    "length flag": ("response_length", lambda s: {"response_length": True}),
    "tokens text": ("tokens", lambda s: {"tokens": "abc"}),
    "tokens null": ("tokens", lambda s: {"tokens": None}),
    "token beyond": ("response_ids", lambda s: {"tokens": at(s["tokens"], -1, VOCAB)}),
    "token point": ("prompt_ids", lambda s: {"tokens": at(s["tokens"], 0, 5.0)}),
    "token huge": ("prompt_ids", lambda s: {"tokens": at(s["tokens"], 0, 10**300)}),
    "reward null": ("reward", lambda s: {"reward": None}),
    "reward parts": ("reward", lambda s: {"reward": {"a": 1.0, "b": 2.0}}),
    "reward nan": ("reward", lambda s: {"reward": math.nan}),
    "status": ("status", lambda s: {"status": "pending"}),
    "status number": ("status", lambda s: {"status": 3}),
    "mask": ("loss_mask", lambda s: {"loss_mask": [1] * (s["response_length"] + 1)}),
    "logprobs of all tokens": (
        "rollout_logprobs",
        lambda s: {"rollout_log_probs": [-0.1] * len(s["tokens"])},
    ),
    "placeholder": (
        "rollout_logprobs",
        lambda s: {"rollout_log_probs": [-9999.0] * s["response_length"]},
    ),
    "group point": ("group_index", lambda s: {"group_index": 1.5}),
    "group huge": ("group_index", lambda s: {"group_index": 10**300}),
    "rollout list": ("rollout_id", lambda s: {"rollout_id": [3]}),
}


def slime_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_executions=True)
    files = [folder / f"{i}.pt" for i in range(len(made.samples))]
    names_executions, names_rollout = made.chance(0.5), made.chance(0.8)
    for number, (file, known) in enumerate(zip(files, made.samples)):
        ids: dict[Any, int] = {}
        samples = []
        for place, s in enumerate(known):
            key = place if s.execution is None else s.execution
            sample = {
                "group_index": s.group,
                "index": place,
                "tokens": s.prompt + s.response,
                "response_length": len(s.response),
                "reward": s.reward,
                "loss_mask": s.mask,
                "rollout_log_probs": s.logprobs,
                "status": s.status,
                "remove_sample": False,
                "metadata": {"turns": place},
                "spec_info": {},
            }
            if names_executions or s.execution is not None:
                sample["rollout_id"] = ids.setdefault(key, 100 + place)
                if s.execution is not None and made.chance(0.5):
                    sample["index"] = list(ids).index(key) + 1000
            elif made.chance(0.5):
                sample["rollout_id"] = None
            if s.status == "aborted":
                sample |= {"reward": made.pick(None, 0.0), "loss_mask": None}
                sample["status"] = made.pick("aborted", "failed")
                siblings = [t for t in known if t.group == s.group and t is not s]
                if not s.response and siblings and made.chance(0.5):
                    sample["tokens"] = []
            elif all(s.mask) and made.chance(0.5):
                sample["loss_mask"] = None
            elif not any(s.mask) and made.chance(0.5):
                sample |= {"loss_mask": None, "remove_sample": True}
            if sample["tokens"] and made.chance(0.2):
                sample["tokens"] = torch.tensor(sample["tokens"])
            samples.append(sample)
        if made.fault is None and made.chance(0.5):
            living = [i for i, s in enumerate(known) if s.status != "aborted"]
            if living:
                where = made.rng.choice(living)
                name, change = SLIME_FAULTS[made.rng.choice(sorted(SLIME_FAULTS))]
                tokens = samples[where]["tokens"]
                samples[where]["tokens"] = tokens if isinstance(tokens, list) else tokens.tolist()
                samples[where] |= change(samples[where])
                made.fault = (f"{file}, sample {where}: field {name!r}",)
        content = {"samples": samples} | ({"rollout_id": number} if names_rollout else {})
        torch.save(content, file)
    return made, files


@pytest.mark.parametrize("seed", seeds())
def test_slime(seed: int, tmp_path: Path) -> None:
    made, files = slime_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, how: int, marker: Path) -> None:
        self.how, self.marker = how, str(marker)

    def __reduce__(self) -> Any:
        ways = [
            (os.system, (f"touch {self.marker}",)),
            (open, (self.marker, "w")),
            (eval, (f"open({self.marker!r}, 'w')",)),
            (exec, (f"open({self.marker!r}, 'w')",)),
            (os.mkdir, (self.marker,)),
        ]
        return ways[self.how % len(ways)]


def hide(rng: random.Random, payload: Payload, samples: list[dict[str, Any]]) -> Any:
    """A slime file with the payload somewhere in it."""
    content: dict[Any, Any] = {"rollout_id": 0, "samples": samples}
    sample = rng.choice(samples)
    place = rng.choice(["root", "list", "value", "metadata", "key", "rollout_id", "tokens"])
    if place == "root":
        return payload
    if place == "list":
        samples.insert(rng.randrange(len(samples) + 1), payload)  # type: ignore[arg-type]
    elif place == "metadata":
        sample["metadata"] = {"a": [{"b": (payload,)}]}
    elif place == "key":
        content[payload] = 1
    elif place == "rollout_id":
        content["rollout_id"] = payload
    elif place == "tokens":
        sample["tokens"] = [*sample["tokens"], payload]
    else:
        sample["note"] = payload
    return content


@pytest.mark.parametrize("seed", seeds())
def test_a_poisoned_pickle_never_executes(seed: int, tmp_path: Path) -> None:
    rng, marker = random.Random(seed), tmp_path / "executed"
    row = {"tokens": [1, 2], "response_length": 1, "reward": 1.0, "status": "completed"}
    content = hide(rng, Payload(seed, marker), [dict(row) for _ in range(rng.randint(1, 3))])
    file = tmp_path / "0.pt"
    how = rng.choice(["zip", "legacy", "pickle"])
    if how == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=rng.randint(2, 5)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with refused(file, "can run code"):
        read_rollouts(file)
    assert not marker.exists()


# --- text ----------------------------------------------------------------------------------------

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(5, VOCAB))]


class WordTokenizer:
    """One token per word, BOS before and EOS behind where they are asked for."""

    eos_token_id = EOS
    bos_token = "<bos>"

    def __init__(self, writes_bos: bool) -> None:
        self.writes_bos = writes_bos

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [WORDS.index(word) if word in WORDS else 0 for word in text.split()]
        return [BOS, *ids, EOS] if add_special_tokens else ids

    def apply_chat_template(self, chat: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        turns = "".join(f"<{m['role']}> {m['content']} " for m in chat)
        return ("<bos> " if self.writes_bos else "") + turns + "<assistant>"


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def text_input(seed: int, folder: Path) -> tuple[Input, list[Path], WordTokenizer]:
    """Prompts plain, rendered or as messages; verl's, TRL's and our own rows."""
    made = make_input(seed)
    tokenizer = WordTokenizer(made.chance(0.5))
    kind = made.pick("own", "verl", "trl")
    form = (
        made.pick("plain", "rendered", "messages")
        if kind == "own"
        else made.pick("plain", "rendered")
    )
    suffix = ".parquet" if kind == "trl" else ".jsonl"
    files = [folder / f"{i}{suffix}" for i in range(len(made.samples))]
    parts = made.pick(1, 2) if kind == "trl" else 1
    if parts == 2:
        made.options["reward_key"] = ["acc", "form"]
    for file, known in zip(files, made.samples):
        rows = []
        for s in known:
            s.prompt = [i if i > 4 else 9 for i in s.prompt]
            s.response = [i if i > 4 else 9 for i in s.response]
            if s.status == "aborted":
                s.response = []
            s.mask, s.logprobs = [bool(s.response)] * len(s.response), None
            s.reward = made.pick(0.0, 1.0, 0.5)
            chat = [{"role": "user", "content": text_of(s.prompt)}]
            text = text_of(s.prompt)
            if form == "plain":
                s.prompt = [BOS, *s.prompt]
            else:
                text = tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                )
                s.prompt = [BOS] * tokenizer.writes_bos + [3, *s.prompt, 4]
            rows.append(text_row(kind, parts, chat if form == "messages" else text, s))
        if made.fault is None and made.chance(0.4):
            living = [i for i, s in enumerate(known) if s.response]
            if living:
                where = made.rng.choice(living)
                place = f"row {where}" if kind == "trl" else f"line {where + 1}"
                name = TEXT_FAULTS[made.rng.randrange(len(TEXT_FAULTS))](kind, rows, where)
                made.fault = (f"{file}, {place}: field {name!r}",)
        if kind == "trl":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(uniform(rows)), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made, files, tokenizer


def text_row(kind: str, parts: int, prompt: Any, sample: Known) -> dict[str, Any]:
    response, reward = text_of(sample.response), sample.reward
    if kind == "own":
        return {"prompt": prompt, "response": response, "reward": reward, "group_id": sample.group}
    if kind == "verl":
        return {"input": prompt, "output": response, "score": reward, "step": 1, "gts": None}
    row = {"step": 1, "prompt": prompt, "completion": response, "acc": reward, "advantage": 0.5}
    if parts == 2:
        # The part that does not apply to a sample is null.
        row |= {"acc": reward - 0.25, "form": 0.25} if reward else {"acc": 0.0, "form": None}
    return row


NAMES = {
    "own": ("prompt", "response", ("reward",)),
    "verl": ("input", "output", ("score",)),
    "trl": ("prompt", "completion", ("acc", "form")),
}


def no_reward(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    for name in NAMES[kind][2]:
        if name in rows[where]:
            rows[where][name] = None
    return "reward"


def no_response(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    rows[where][NAMES[kind][1]] = None
    return "response"


def no_prompt(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    rows[where][NAMES[kind][0]] = "" if isinstance(rows[where][NAMES[kind][0]], str) else []
    return "prompt"


TEXT_FAULTS = [no_reward, no_response, no_prompt]


@pytest.mark.parametrize("seed", seeds())
def test_text(seed: int, tmp_path: Path) -> None:
    made, files, tokenizer = text_input(seed, tmp_path)
    settle(made, files, tokenizer=tokenizer, vocab_size=VOCAB)


@pytest.mark.parametrize("make", [jsonl_input, parquet_input, slime_input, text_input])
def test_families_hold_good_and_bad_inputs(make: Callable[..., Any], tmp_path: Path) -> None:
    made = [make(seed, tmp_path)[0] for seed in range(40)]
    assert_both_occur([one.fault is None for one in made])
    samples = [s for one in made if one.fault is None for of_file in one.samples for s in of_file]
    assert {s.status for s in samples} == {"completed", "aborted"}
    assert {bool(s.response) for s in samples} == {True, False}
    assert any(len(one.samples) > 1 for one in made if one.fault is None)
