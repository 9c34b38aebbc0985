"""One reading of JSON, in every process."""

from __future__ import annotations

import sys

import pytest

from megatron_pg.data import parse_json_text


@pytest.mark.parametrize("limit", [300, 20_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth_is_bounded_by_the_text_alone(brackets: str, limit: int) -> None:
    first, last = ('{"a": ', "}") if brackets == "{}" else brackets
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        # The innermost list counts.
        assert parse_json_text(first * 63 + "[]" + last * 63)
        for levels in (64, 1_000, 15_000, 100_000):
            with pytest.raises(ValueError, match="is nested too deeply, at most 64 levels"):
                parse_json_text(first * levels + "[]" + last * levels)
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' stands twice in one object"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("9" * 5_000, "Exceeds the limit"),
    ],
)
def test_what_is_no_json(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json_text(text)


@pytest.mark.parametrize(("text", "value"), [("5", 5), ("null", None), ('"a"', "a"), ("1.5", 1.5)])
def test_a_value_may_be_no_container(text: str, value: object) -> None:
    assert parse_json_text(text) == value


def test_bytes_are_utf8() -> None:
    assert parse_json_text('{"ä": [1.5, null, "日"]}'.encode()) == {"ä": [1.5, None, "日"]}
