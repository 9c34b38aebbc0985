"""How many logits exist at one time, and what the vocabulary head takes for them."""

from __future__ import annotations

import torch

_MAX_TOKENS = 4096
_MAX_BYTES = 1280 << 20


def default_chunk_tokens(num_columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose logits exist at one time, unless told otherwise.

    On CUDA 4096, less where their logits would take more than 1.25 GiB; 1024 elsewhere.

    Args:
        num_columns: vocabulary entries of a rank.
        dtype: of the logits.
        device: that they are on.
    """
    if device.type != "cuda":
        return 1024
    return min(_MAX_TOKENS, max(_MAX_BYTES // max(num_columns * dtype.itemsize, 1), 1))


def head_bytes(
    num_rows: int,
    hidden_size: int,
    num_columns: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    chunk_tokens: int | None = None,
    has_weight_grad: bool = False,
) -> int:
    """Largest memory that a backward of ``vocab_parallel_logprobs`` takes beside what it is given.

    Logits, the gradient of the weight unless it goes into a buffer that is there, and that of the
    rows in the accumulation dtype. The few numbers per row are left out.

    Args:
        num_rows: predictions of a call.
        hidden_size: of the rows.
        num_columns: vocabulary entries of a rank.
        dtype: of rows and weight.
        device: that they are on.
        chunk_tokens: as ``vocab_parallel_logprobs`` takes it.
        has_weight_grad: whether the weight's gradient is added to a buffer.
    """
    wide = torch.promote_types(dtype, torch.float32)
    chunk = min(chunk_tokens or default_chunk_tokens(num_columns, dtype, device), num_rows)
    a_logit = dtype.itemsize
    if device.type != "cuda":
        # Two of the operators' results beside the product, which is one of them where it is wide.
        a_logit = 2 * wide.itemsize + (0 if dtype == wide else dtype.itemsize)
    weight = 0 if has_weight_grad else num_columns * hidden_size * dtype.itemsize
    return chunk * num_columns * a_logit + weight + num_rows * hidden_size * wide.itemsize
