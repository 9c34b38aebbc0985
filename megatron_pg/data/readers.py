"""Recorded rollouts in, groups out; and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, get_args

from .formats import CONVERTERS, FormatError
from .problems import Problems
from .records import (
    Record,
    parquet_columns,
    read_jsonl_records,
    read_parquet_records,
    read_slime_records,
)
from .schema import ParsedRow, RowParser
from .text import TextEncoder, Tokenizer
from .types import OPTIONAL_TOKEN_VALUES, Group, Sample

Format = Literal["auto", "jsonl", "parquet", "slime", "nemo_rl", "verl", "trl"]
PathLikes = str | PathLike[str] | Sequence[str | PathLike[str]]

RECORD_READERS = {
    "jsonl": read_jsonl_records,
    "nemo_rl": read_jsonl_records,
    "verl": read_jsonl_records,
    "parquet": read_parquet_records,
    "trl": read_parquet_records,
    "slime": read_slime_records,
}


def read_rollouts(
    paths: PathLikes,
    *,
    format: Format = "auto",
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    append_eos: bool = False,
    reward_key: str | Sequence[str] = (),
) -> list[Group]:
    """Groups of samples from files, in order of first appearance.

    Our own format has one row per response, in JSONL or parquet; its fields are listed in
    ``megatron_pg/data/schema.py``, the formats of other trainers in ``formats.py``. Rows belong to
    one group when their ``group_id`` is equal, in all files together. No row is dropped.

    Args:
        paths: one file or several.
        format: "auto" goes by the suffix (.jsonl, .parquet, .pt) and the fields of the first row.
        tokenizer: for rows that hold text; anything with the interface of transformers.
        vocab_size: token ids must lie below.
        append_eos: end completed responses given as text with the end-of-sequence token.
        reward_key: part or parts of the reward that are summed, for slime rewards that are dicts
            and TRL tables with several reward columns.

    Raises:
        ValueError: on anything malformed. One error lists the problems of all files, up to 20, each
            with file, row and field.
        ImportError: on parquet files without pyarrow.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} must be one of {', '.join(get_args(Format))}")
    files = [Path(p) for p in ([paths] if isinstance(paths, str | PathLike) else paths)]
    if not files:
        raise ValueError("paths is empty: name at least one file")
    if append_eos and tokenizer is None:
        raise ValueError("append_eos=True concerns rows of text; pass tokenizer=")
    encoder = TextEncoder(tokenizer, append_eos) if tokenizer is not None else None
    parser = RowParser(encoder, vocab_size)
    keys = (reward_key,) if isinstance(reward_key, str) else tuple(reward_key)
    problems = Problems()
    rows: list[tuple[str, ParsedRow]] = []
    for file in files:
        num_rows = 0
        num_problems = problems.total
        for where, record in _records(file, format, keys, problems):
            num_rows += 1
            parsed = parser.parse(record)
            if isinstance(parsed, ParsedRow):
                rows.append((where, parsed))
            else:
                for field, message in parsed:
                    problems.add(where, message, field)
        if num_rows == 0 and problems.total == num_problems:
            problems.add(str(file), "has no rows")
    _check_rows(rows, problems)
    problems.raise_if_any()
    return _group_rows([row for _, row in rows])


def write_rollouts(groups: Sequence[Group], path: str | PathLike[str]) -> None:
    """Write ``groups`` as JSONL, one row per sample; ``read_rollouts`` gives them back exactly.

    Raises:
        ValueError: on no groups, a group without samples, two groups with one ``group_id`` (they
            would be read as one), or metadata that JSON does not hold.
        OSError: if the file cannot be written.
    """
    if not groups:
        raise ValueError("groups is empty: a file without rows cannot be read back")
    seen: set[str] = set()
    lines = []
    for group in groups:
        if group.group_id in seen or not group.samples:
            raise ValueError(
                f"group {group.group_id!r} is empty or there twice; rename it or leave it out"
            )
        seen.add(group.group_id)
        for i, sample in enumerate(group.samples):
            try:
                lines.append(json.dumps(_as_row(group.group_id, sample), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"sample {i} of group {group.group_id!r} cannot be written as JSON: {error}"
                ) from error
    Path(fspath(path)).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_row(group_id: str, sample: Sample) -> dict[str, object]:
    row: dict[str, object] = {
        "group_id": group_id,
        "sample_id": sample.sample_id,
        "prompt_ids": sample.prompt_ids.tolist(),
        "response_ids": sample.response_ids.tolist(),
        "reward": sample.reward,
        "loss_mask": sample.loss_mask.int().tolist(),
        "status": sample.status,
        "metadata": dict(sample.metadata),
    }
    for name in OPTIONAL_TOKEN_VALUES:
        values = getattr(sample, name)
        if values is not None:
            row["advantage" if name == "advantages" else name] = values.tolist()
    return {name: value for name, value in row.items() if value is not None}


def _records(
    file: Path, format: str, reward_key: Sequence[str], problems: Problems
) -> Iterator[Record]:
    """Rows of our schema from one file of any format."""
    if not file.is_file():
        problems.add(str(file), "is a directory; name its files" if file.is_dir() else "is missing")
        return
    if format == "auto":
        found = _detect_format(file)
        if found is None:
            problems.add(str(file), "has no known suffix (.jsonl, .parquet, .pt); pass format=")
            return
        format = found
    if reward_key and format not in ("slime", "trl"):
        problems.add(str(file), f"has format {format!r}, which does not read reward_key=; omit it")
        return
    convert = CONVERTERS.get(format)
    numbers: dict[str, int] = {}

    def name_group(key: str) -> str:
        return f"{file}:{numbers.setdefault(key, len(numbers))}"

    for where, record in RECORD_READERS[format](file, problems):
        if convert is None:
            yield where, record
            continue
        try:
            yield where, convert(record, name_group, reward_key)
        except FormatError as error:
            problems.add(where, error.message, error.field)


def _detect_format(file: Path) -> str | None:
    if file.suffix == ".pt":
        return "slime"
    if file.suffix == ".parquet":
        return "trl" if "completion" in parquet_columns(file) else "parquet"
    if file.suffix not in (".jsonl", ".json"):
        return None
    _, first = next(read_jsonl_records(file, Problems()), ("", {}))
    if {"token_ids", "input_lengths"} <= first.keys():
        return "nemo_rl"
    return "verl" if {"input", "output", "score"} <= first.keys() else "jsonl"


def _check_rows(rows: Sequence[tuple[str, ParsedRow]], problems: Problems) -> None:
    """Problems that only show between rows."""
    ids: dict[str, str] = {}
    first_of_group: dict[str, tuple[str, Sample]] = {}
    for where, row in rows:
        sample = row.sample
        if sample.sample_id is not None:
            earlier = ids.setdefault(sample.sample_id, where)
            if earlier != where:
                message = f"{sample.sample_id!r} is also that of {earlier}"
                problems.add(where, message, "sample_id")
        if (row.group_id is None) != (rows[0][1].group_id is None):
            message = f"must be on every row or on none; compare {rows[0][0]}"
            problems.add(where, message, "group_id")
        key = repr(row.prompt_key) if row.group_id is None else row.group_id
        first_where, first = first_of_group.setdefault(key, (where, sample))
        for name in OPTIONAL_TOKEN_VALUES:
            if (getattr(sample, name) is None) != (getattr(first, name) is None):
                field = "advantage" if name == "advantages" else name
                message = f"must be on all rows of a group or on none; compare {first_where}"
                problems.add(where, message, field)


def _group_rows(rows: Sequence[ParsedRow]) -> list[Group]:
    members: dict[str | bytes, list[Sample]] = {}
    for row in rows:
        key = row.prompt_key if row.group_id is None else row.group_id
        members.setdefault(key, []).append(row.sample)
    return [
        Group(key if isinstance(key, str) else f"prompt-{number}", tuple(samples))
        for number, (key, samples) in enumerate(members.items())
    ]
