"""The forms in which routes lie in files and come from engines."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .types import UNKNOWN_ROUTE
from .values import show

_DTYPES = ("uint8", "int16", "uint16", "int32", "int64")
_NPY = b"\x93NUMPY"
# What a bare string of bytes holds: SGLang's ``meta_info.routed_experts``.
_BARE_DTYPE = "int32"
_LIMIT = torch.iinfo(torch.int16).max


def encode_routes(routes: Tensor) -> dict[str, Any]:
    """Routes of a sample as JSON holds them in the fewest bytes; ``decode_routes`` reads them.

    An object of ``shape``, ``dtype`` and the little-endian bytes as ``base64``. The last token's
    row is left out where its route is not known.
    """
    if len(routes) and bool((routes[-1] == UNKNOWN_ROUTE).all()):
        routes = routes[:-1]
    array = routes.numpy()
    is_small = not array.size or (array.min() >= 0 and array.max() <= 255)
    array = array.astype("uint8" if is_small else "<i2")
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "base64": base64.b64encode(array.tobytes()).decode("ascii"),
    }


def decode_routes(
    value: Any, width: tuple[int, int] | None = None, num_tokens: int | None = None
) -> Tensor:
    """``[tokens, layers, topk]`` int16 from any of the forms that routes come in.

    * nested lists, arrays and tensors ``[tokens][layers][topk]`` (slime and miles store arrays)
    * what ``encode_routes`` gives
    * base64 of a ``.npy`` file, or the file's bytes: vLLM's ``choices[i].routed_experts``
    * base64 of int32 values alone, which say nothing of their shape: SGLang

    Args:
        value: in one of these forms.
        width: layers and experts of a token, read for the last form alone: others say theirs.
        num_tokens: that there are; the row of the last one may be missing.

    Raises:
        ValueError: what is wrong with the value, without its name.
    """
    array = _as_array(value, width)
    if array.ndim != 3 or array.dtype.name not in _DTYPES:
        raise ValueError(
            f"has shape {list(array.shape)} of {array.dtype.name}, must be integers "
            "[tokens][layers][topk]"
        )
    if num_tokens is not None and len(array) not in (num_tokens, num_tokens - 1):
        raise ValueError(
            f"has {len(array)} rows, prompt and response have {num_tokens} tokens; the last one's "
            "alone may be missing"
        )
    if array.size and not UNKNOWN_ROUTE <= array.min() <= array.max() <= _LIMIT:
        raise ValueError(f"reaches from {array.min()} to {array.max()}, no model has such experts")
    return torch.from_numpy(array.astype(np.int16))


def _as_array(value: Any, width: tuple[int, int] | None) -> npt.NDArray[Any]:
    if isinstance(value, Tensor | np.ndarray):
        return np.asarray(value)
    if isinstance(value, list):
        return _from_lists(value)
    if isinstance(value, dict):
        return _from_object(value)
    if isinstance(value, str):
        value = _from_base64(value)
    if not isinstance(value, bytes):
        raise ValueError(
            f"is {show(value)}, must be lists, base64 or an object with shape and base64"
        )
    if value.startswith(_NPY):
        return _from_npy(value)
    if width is None:
        raise ValueError(
            "is base64 without a shape; write {'shape': [tokens, layers, topk], 'dtype': "
            f"{_BARE_DTYPE!r}, 'base64': ...}}"
        )
    row = math.prod(width) * np.dtype(_BARE_DTYPE).itemsize
    if len(value) % row:
        raise ValueError(
            f"has {len(value)} bytes, no multiple of {row}: {width[0]} layers, {width[1]} experts "
            f"of a token, {_BARE_DTYPE}"
        )
    return _from_bytes(value, _BARE_DTYPE, (len(value) // row, *width))


def _from_lists(value: list[Any]) -> npt.NDArray[Any]:
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # ragged; beyond 64 bits
        array = np.array(None)
    if array.dtype.kind not in "iu":
        raise ValueError("must be integers [tokens][layers][topk], equally many everywhere")
    return array


def _from_object(value: dict[str, Any]) -> npt.NDArray[Any]:
    shape, dtype = value.get("shape"), value.get("dtype")
    if value.keys() != {"shape", "dtype", "base64"} or not isinstance(value["base64"], str):
        raise ValueError(
            f"has the keys {sorted(map(str, value))}, must have shape, dtype and base64"
        )
    if not isinstance(shape, list) or [type(n) for n in shape] != [int] * 3 or min(shape) < 0:
        raise ValueError(f"has shape {show(shape)}, must be [tokens, layers, topk]")
    if dtype not in _DTYPES:
        raise ValueError(f"has dtype {show(dtype)}, must be one of {', '.join(_DTYPES)}")
    return _from_bytes(_from_base64(value["base64"]), dtype, shape)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is no base64: {error}") from error


def _from_npy(content: bytes) -> npt.NDArray[Any]:
    """Nothing is unpickled, and nothing larger is made than what came."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(stream)
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"is no readable .npy: {error}") from error
    if is_fortran or dtype.name not in _DTYPES:
        raise ValueError(f"holds {dtype.name} values, must be integers in C order")
    return _from_bytes(stream.read(), dtype.str, shape)


def _from_bytes(content: bytes, dtype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    kind = np.dtype(dtype)
    kind = kind.newbyteorder("<") if kind.byteorder == "=" else kind
    if math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(
            f"has {len(content)} bytes, {list(shape)} of {kind.name} take "
            f"{math.prod(shape) * kind.itemsize}"
        )
    return np.frombuffer(content, dtype=kind).reshape(tuple(shape))
