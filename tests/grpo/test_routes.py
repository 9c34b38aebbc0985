"""A step that replays routes equals the samples written out with the same routes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import group_shape  # noqa: E402
from megatron_pg.grpo import decode_groups, encode_groups  # noqa: E402
from tests.data.routed import with_routes  # noqa: E402
from tests.data.samples import random_groups  # noqa: E402

SHAPE = (3, 2)


def test_routes_go_from_replica_to_replica():
    groups = with_routes(random_groups(5, 3), SHAPE)
    groups.append(random_groups(6, 1)[0])
    sent = [(i, group, group_shape(group)) for i, group in enumerate(groups)]
    arrived = decode_groups(encode_groups(sent))
    for (_, before, _), (_, after, _) in zip(sent, arrived):
        for x, y in zip(before.samples, after.samples):
            if x.routed_experts is None:
                assert y.routed_experts is None
            else:
                assert torch.equal(x.routed_experts, y.routed_experts)
