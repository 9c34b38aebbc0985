"""What a token keeps in linear attention until the backward pass."""

from __future__ import annotations

from .layer_sizes import ModuleKinds, RankShare
from .linear_sizes import LinearSizes


def linear_values(linear: LinearSizes, share: RankShare, modules: ModuleKinds) -> int:
    """Numbers of one token between the projections of one layer, on one rank.

    With kernels. PyTorch's rules, which run on CPUs, keep many times as much, by the lengths of the
    runs that they take at once; that is left out where the convolution and its activation are not
    one kernel either.
    """
    heads = linear.num_value_heads // share.tp_size
    qk = 2 * linear.num_key_heads * linear.key_dim // share.tp_size
    v = heads * linear.value_dim
    # The gate is a view of what was projected, which stays for it as a whole.
    projected = qk + 2 * v + linear.head_values * heads
    of_rule = _state_space_values if linear.rule == "state_space" else _gated_delta_values
    return projected + of_rule(linear, share, is_fused=modules.has_fused_recurrence)


def linear_read_values(linear: LinearSizes, share: RankShare) -> int:
    """Of those, what the recurrence reads: q, k, v and the numbers of every value head."""
    heads = linear.num_value_heads // share.tp_size
    if linear.rule == "state_space":
        # Steps, and what they are summed up to.
        return _convolved_values(linear, share) + 2 * heads
    return heads * (2 * linear.key_dim + linear.value_dim + 2)


def linear_gradient_values(linear: LinearSizes, share: RankShare) -> int:
    """What the backward pass makes at once: gradients of what was read, and states of every chunk.

    These are computed anew, and have gradients.
    """
    states = linear.num_value_heads * linear.key_dim * linear.value_dim // share.tp_size
    return linear_read_values(linear, share) + 2 * states // linear.chunk_tokens


def _gated_delta_values(linear: LinearSizes, share: RankShare, *, is_fused: bool) -> int:
    heads = linear.num_value_heads // share.tp_size
    qk = 2 * linear.num_key_heads * linear.key_dim // share.tp_size
    v = heads * linear.value_dim
    convolved = (qk + v) * (1 if is_fused else 2)
    # Queries and keys of length one, for each value head; a kernel keeps a row of products for
    # each, and what it returns.
    is_repeated = linear.num_value_heads != linear.num_key_heads
    normed = qk if is_repeated or not is_fused else 0
    products = heads * linear.chunk_tokens if is_fused else 0
    # Read by norm and gate, which are one, and by the projection behind them.
    return convolved + normed + linear_read_values(linear, share) + products + 2 * v


def _state_space_values(linear: LinearSizes, share: RankShare, *, is_fused: bool) -> int:
    heads = linear.num_value_heads // share.tp_size
    v, convolved = heads * linear.value_dim, _convolved_values(linear, share)
    # Read by the convolution; steps before softplus.
    around = convolved + heads + linear_read_values(linear, share)
    if is_fused:
        # A kernel keeps what it returns; norm and gate are one, and the projection reads them.
        return around + 3 * v
    # An activation is apart from its convolution, and so are norm and gate; nothing is summed up.
    return around + convolved - heads + 5 * v


def _convolved_values(linear: LinearSizes, share: RankShare) -> int:
    """Of Mamba-2: values of a rank's heads, and queries and keys of their groups.

    Ranks of a context have copies of a group where they are more.
    """
    groups = max(linear.num_key_heads // share.tp_size, share.cp_size)
    return 2 * groups * linear.key_dim + linear.out_dim // share.tp_size
