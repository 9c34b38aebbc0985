"""Routes in the forms of files and engines, and forms that are none."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_pg.data import (
    UNKNOWN_ROUTE,
    decode_routes,
    encode_routes,
    read_rollouts,
    write_rollouts,
)
from tests.data.routed import random_routes, with_routes
from tests.data.samples import assert_same_groups, make_sample, random_groups

WIDTH = (3, 2)
ROUTES = random_routes(5, WIDTH, torch.Generator().manual_seed(0))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


FORMS = {
    "lists": ROUTES.tolist(),
    "array": ROUTES.numpy().astype(np.int32),
    "tensor": ROUTES.long(),
    "object": encode_routes(ROUTES),
    "object_int32": {
        "shape": [5, 3, 2],
        "dtype": "int32",
        "base64": text(ROUTES.numpy().astype("<i4").tobytes()),
    },
    "vllm": text(npy(ROUTES.numpy().astype(np.uint8))),
    "vllm_uint16": text(npy(ROUTES.numpy().astype(np.uint16))),
    "npy_big_endian": text(npy(ROUTES.numpy().astype(">i4"))),
    "npy_bytes": npy(ROUTES.numpy().astype(np.int32)),
    "sglang": text(ROUTES.numpy().astype("<i4").tobytes()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form):
    found = decode_routes(FORMS[form], WIDTH)
    assert found.dtype == torch.int16 and torch.equal(found, ROUTES)
    if form != "sglang":
        assert torch.equal(decode_routes(FORMS[form]), ROUTES)


def header(shape: str, descr: str = "<i4", order: str = "False") -> str:
    told = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return text(b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told + bytes(120))


HOSTILE = {
    "number": (3, "is 3 (int)"),
    "ragged": ([[[1, 2]], [[1]]], "equally many everywhere"),
    "floats": ([[[1.0, 2.0]]], "must be integers"),
    "booleans": ([[[True, False]]], "must be integers"),
    "text_inside": ([[["1", "2"]]], "must be integers"),
    "huge": ([[[2**70, 1]]], "must be integers"),
    "large": ([[[40000, 1]]], "no model has such experts"),
    "below": ([[[-2, 1]]], "no model has such experts"),
    "flat": ([1, 2], "has shape [2]"),
    "empty": ([], "must be integers"),
    "no_base64": ("%%%", "is no base64"),
    "no_shape": (FORMS["sglang"], "base64 without a shape"),
    "other_keys": ({"shape": [1], "data": ""}, "must have shape, dtype and base64"),
    "wrong_shape": ({"shape": [5, -3, 2], "dtype": "uint8", "base64": ""}, "has shape [5, -3, 2]"),
    "wrong_dtype": ({"shape": [5, 3, 2], "dtype": "O", "base64": ""}, "has dtype 'O'"),
    "cut": ({"shape": [5, 3, 2], "dtype": "uint8", "base64": "AAAA"}, "has 3 bytes"),
    "npy_cut": (text(npy(ROUTES.numpy())[:-4]), "bytes, [5, 3, 2] of int16 take 60"),
    "npy_no_header": (text(b"\x93NUMPY\x01\x00\xff\xff{"), "no readable .npy"),
    "npy_code": (header("__import__('os')"), "no readable .npy"),
    "npy_pickle": (header("(5, 3, 2)", "|O"), "holds object values"),
    "npy_bomb": (header("(1000000000, 1000, 1000)"), "has 120 bytes"),
    "npy_columns": (header("(5, 3, 2)", order="True"), "in C order"),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_what_is_no_route_is_refused(form):
    value, message = HOSTILE[form]
    with pytest.raises(ValueError) as error:
        decode_routes(value)
    assert message in str(error.value)


def test_a_width_is_that_of_values_which_do_not_tell_theirs():
    """An engine may leave out the layers without experts: what a model has, ``RouteShape`` says."""
    assert torch.equal(decode_routes(FORMS["vllm"], (4, 2)), ROUTES)
    with pytest.raises(ValueError, match="no multiple of 28"):
        decode_routes(FORMS["sglang"], (7, 1))


@pytest.mark.parametrize("num_experts", [4, 384])
def test_written_rollouts_come_back(tmp_path, num_experts):
    groups = with_routes(random_groups(2, 4), WIDTH, num_experts=num_experts)
    file = tmp_path / "rollouts.jsonl"
    write_rollouts(groups, file)
    assert_same_groups(read_rollouts(file), groups)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {row["routed_experts"]["dtype"] for row in rows}
    assert kinds == {"uint8"} if num_experts < 256 else "int16" in kinds
    sample = groups[0].samples[0]
    assert rows[0]["routed_experts"]["shape"][0] == len(sample.tokens) - 1
    assert (sample.routed_experts[-1] == UNKNOWN_ROUTE).all()


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (ROUTES.tolist(), "has 5 rows, prompt and response have 3 tokens"),
        ([[[1, 50000]], [[0, 1]]], "no model has such experts"),
        ("%%%", "is no base64"),
    ],
    ids=["rows", "large", "base64"],
)
def test_malformed_routes_name_file_row_and_field(tmp_path, routes, message):
    file = tmp_path / "rollouts.jsonl"
    row = {"prompt_ids": [1, 2], "response_ids": [3], "reward": 1, "routed_experts": routes}
    good = {**row, "routed_experts": [[[0, 1]]] * 2}
    file.write_text("\n".join(map(json.dumps, [good, row])))
    with pytest.raises(ValueError) as error:
        read_rollouts(file)
    assert f"{file}, line 2: field 'routed_experts'" in str(error.value)
    assert message in str(error.value)


def test_routes_need_exact_tokens_and_are_on_all_rows_of_a_group(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    words = {"prompt": "a", "response": "b", "reward": 1, "routed_experts": [[[0, 1]]]}
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="belongs to tokens that text does not determine"):
        read_rollouts(file)
    bare = {"prompt_ids": [1, 2], "response_ids": [3], "reward": 1}
    rows = [bare, {**bare, "routed_experts": [[[0, 1]]] * 2}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="'routed_experts' must be on all rows of a group or on"):
        read_rollouts(file)


def test_parquet_holds_them_as_lists_or_bytes(tmp_path):
    sample = make_sample([1, 2, 3], [4, 5, 6])
    row = {"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6], "reward": 1.0}
    for name, value in (("lists", FORMS["lists"]), ("npy", FORMS["npy_bytes"])):
        table = pyarrow.Table.from_pylist([{**row, "routed_experts": value}])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        (group,) = read_rollouts(tmp_path / f"{name}.parquet")
        assert torch.equal(group.samples[0].routed_experts[:5], ROUTES)
        assert torch.equal(group.samples[0].tokens, sample.tokens)
