"""Hostile JSONL and parquet files of our own format."""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.data.hostile_samples import VOCAB, Input, Known, make_input


def own_row(made: Input, sample: Known, has_ids: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_ids": sample.prompt,
        "response_ids": sample.response,
        "reward": sample.reward,
        "loss_mask": made.pick(sample.mask, [int(flag) for flag in sample.mask]),
        "rollout_logprobs": sample.logprobs,
        "rollout_id": sample.rollout,
        "loss_weight": sample.weight,
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
    "routes long": ("routed_experts", lambda r: [[[0, 1]]] * 99),
    "routes ragged": ("routed_experts", lambda r: [[[0, 1]], [[0]]]),
    "routes text": ("routed_experts", lambda r: "AAAA"),
    "routes flat": ("routed_experts", lambda r: [0] * len(r["response_ids"])),
    "status": ("status", lambda r: "finished"),
    "group point": ("group_id", lambda r: 0.5),
    "rollout list": ("rollout_id", lambda r: [1]),
    "weight zero": ("loss_weight", lambda r: 0),
    "weight below": ("loss_weight", lambda r: -0.5),
    "weight infinite": ("loss_weight", lambda r: math.inf),
    "weight text": ("loss_weight", lambda r: "1.0"),
    "weight list": ("loss_weight", lambda r: [1.0] * len(r["response_ids"])),
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
    kinds = ["sample_id", "rollout_logprobs", "rollout_id", "loss_weight"]
    name = made.rng.choice(kinds + ["group_id", "group_id of all"] * ("group_id" in second))
    if name == "sample_id":
        first[name] = second[name] = "same"
        first["rollout_id"] = None
    elif name == "rollout_logprobs":
        count = len(second["response_ids"])
        second[name] = None if second[name] is not None else [-1.0] * count
    elif name == "rollout_id":
        first[name] = second[name] = "same"
        second["reward"] = float(first["reward"]) + 1
    elif name == "loss_weight":
        second[name] = 1.0 if second[name] is None else None
    elif name == "group_id":
        second |= {"prompt_ids": [6, *second["prompt_ids"][1:]], "rollout_id": None}
    else:
        name = "group_id"
        second[name] = None
    made.fault = (f"{files[number]}, {place} {again + (place == 'line')}: field {name!r}",)


def jsonl_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_rollouts=True)
    has_ids = made.has_ids
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


IDS = [
    pyarrow.list_(pyarrow.int64()),
    pyarrow.list_(pyarrow.int32()),
    pyarrow.list_(pyarrow.uint16()),
    pyarrow.large_list(pyarrow.int64()),
]


def parquet_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_rollouts=True)
    has_ids = made.has_ids
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
