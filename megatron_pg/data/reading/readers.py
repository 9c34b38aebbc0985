"""Recorded rollouts in, groups out; and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, get_args

from ..route_forms import encode_routes
from ..types import OPTIONAL_TOKEN_VALUES, Group, Sample
from .formats import CONVERTERS, READS_REWARD_KEY, FormatError
from .grouping import PlacedRow, check_rows, group_rows
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

RolloutFormat = Literal["auto", "jsonl", "parquet", "slime", "nemo_rl", "verl", "trl"]
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
    format: RolloutFormat = "auto",
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    append_eos: bool = False,
    reward_key: str | Sequence[str] = (),
    group_across_files: bool = False,
) -> list[Group]:
    """Groups of samples from files, in order of first appearance.

    Our own format has one row per response, in JSONL (gzipped or not) or parquet; its fields are
    listed in ``reading/schema.py``, other trainers' formats in ``reading/formats/``. Rows of a
    file belong to one group when their ``group_id`` is equal. Ids that several files use are told
    apart by the file's name. No row is dropped.

    Args:
        paths: one file or several.
        format: "auto" goes by the suffix (.jsonl, .jsonl.gz, .parquet, .pt) and the fields of the
            first row.
        tokenizer: for rows that hold text; anything with the interface of transformers.
        vocab_size: token ids must lie below.
        append_eos: end completed responses given as text with the end-of-sequence token.
        reward_key: part or parts of the reward that are summed, for slime rewards that are dicts
            and TRL tables with several reward columns.
        group_across_files: whether equal ids of several files mean one group, for groups that a
            recorder spread over files; else ids may start anew in every file.

    Raises:
        ValueError: on anything malformed. One error lists the problems of all files, up to 20, each
            with file, row and field.
        ImportError: on parquet files without pyarrow.
    """
    formats = get_args(RolloutFormat)
    if format not in formats:
        raise ValueError(f"format={format!r} must be one of {', '.join(formats)}")
    files = [Path(p) for p in ([paths] if isinstance(paths, str | PathLike) else paths)]
    if not files:
        raise ValueError("paths is empty: name at least one file")
    if append_eos and tokenizer is None:
        raise ValueError("append_eos=True concerns rows of text; pass tokenizer=")
    encoder = TextEncoder(tokenizer, append_eos) if tokenizer is not None else None
    parser = RowParser(encoder, vocab_size)
    keys = (reward_key,) if isinstance(reward_key, str) else tuple(reward_key)
    problems = Problems()
    rows: list[PlacedRow] = []
    names: dict[str, str] = {}
    seen: dict[Path, Path] = {}
    for file in files:
        if (first := seen.setdefault(file.resolve(), file)) is not file:
            problems.add(str(file), f"is given twice (as {first}); name it once")
            continue
        if not group_across_files:
            names = {}
        scope = "" if group_across_files else str(file)
        num_rows, num_problems = 0, problems.total
        for where, record in _records(file, format, keys, names, problems):
            num_rows += 1
            parsed = parser.parse(record)
            if isinstance(parsed, ParsedRow):
                rows.append(PlacedRow(where, scope, parsed))
            else:
                for field, message in parsed:
                    problems.add(where, message, field)
        if num_rows == 0 and problems.total == num_problems:
            problems.add(str(file), "has no rows")
    check_rows(rows, problems)
    problems.raise_if_any()
    return group_rows(rows)


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
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"sample {i} of group {group.group_id!r} cannot be written as JSON: {error}"
                ) from error
    Path(fspath(path)).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_row(group_id: str, sample: Sample) -> dict[str, object]:
    row: dict[str, object] = {
        "group_id": group_id,
        "sample_id": sample.sample_id,
        "rollout_id": sample.rollout_id,
        "loss_weight": sample.loss_weight,
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
    if sample.routed_experts is not None:
        row["routed_experts"] = encode_routes(sample.routed_experts)
    return {name: value for name, value in row.items() if value is not None}


def _records(
    file: Path,
    format: str,
    reward_key: Sequence[str],
    names: dict[str, str],
    problems: Problems,
) -> Iterator[Record]:
    """Rows of our schema from one file of any format; ``names`` holds the groups named so far."""
    if not file.is_file():
        told = "is a directory; name its files" if file.is_dir() else "is missing"
        if told == "is missing" and any(sign in file.name for sign in "*?["):
            told = "is missing; patterns are not expanded, name the files"
        problems.add(str(file), told)
        return
    if format == "auto":
        found = _detect_format(file)
        if found is None:
            known = ".jsonl, .jsonl.gz, .parquet, .pt"
            problems.add(str(file), f"has no known suffix ({known}); give its format")
            return
        format = found
    if reward_key and format not in READS_REWARD_KEY:
        problems.add(str(file), f"has format {format!r}, which does not read reward_key=; omit it")
        return
    records = RECORD_READERS[format](file, problems)
    if format not in CONVERTERS:
        yield from records
        return

    def name_group(key: str) -> str:
        return names.setdefault(key, f"{file}:{len(names)}")

    placed = list(records)
    try:
        convert = CONVERTERS[format]([record for _, record in placed], name_group, reward_key)
    except FormatError as error:
        problems.add(str(file), error.message, error.field)
        return
    for where, record in placed:
        try:
            yield where, convert(record)
        except FormatError as error:
            problems.add(where, error.message, error.field)


def _detect_format(file: Path) -> str | None:
    if file.suffix == ".pt":
        return "slime"
    if file.suffix == ".parquet":
        return "trl" if "completion" in parquet_columns(file) else "parquet"
    if not file.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        return None
    _, first = next(read_jsonl_records(file, Problems()), ("", {}))
    if {"token_ids", "input_lengths"} <= first.keys():
        return "nemo_rl"
    return "verl" if {"input", "output", "score"} <= first.keys() else "jsonl"
