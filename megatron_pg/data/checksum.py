"""Whether two recordings are the same to training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .types import OPTIONAL_TOKEN_VALUES, Group


def content_checksum(groups: Sequence[Group]) -> str:
    """SHA-256 of all that training reads of the groups, in their order; names and metadata are not.

    Equal for groups that were read from other files or in another format.
    """
    digest = hashlib.sha256()
    for group in groups:
        digest.update(f"group of {len(group.samples)};".encode())
        # Which samples share a rollout counts, not what it is called.
        for sample, rollout in zip(group.samples, group.rollouts.tolist()):
            # The word of earlier versions: their runs of recordings can be taken up.
            digest.update(
                f"{sample.status} {float(sample.reward).hex()} execution {rollout};".encode()
            )
            if sample.loss_weight is not None:
                digest.update(f"loss_weight {float(sample.loss_weight).hex()};".encode())
            fields = ("prompt_ids", "response_ids", "loss_mask", *OPTIONAL_TOKEN_VALUES)
            for field in (*fields, "routed_experts"):
                values = getattr(sample, field)
                if values is not None:
                    size = len(values) if values.ndim == 1 else list(values.shape)
                    digest.update(f"{field} {values.dtype} {size};".encode())
                    digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
