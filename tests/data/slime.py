"""slime's dumps: prompts, rollouts and samples that fan out of them."""

from __future__ import annotations

import torch

P, Q = [5, 6, 7, 8], [9, 10, 11]


def slime_sample(group_index, index, prompt, response, reward, **fields):
    """As a sample's ``to_dict``."""
    sample = {
        "group_index": group_index,
        "index": index,
        "rollout_id": None,
        "prompt": "",
        "tokens": prompt + response,
        "response": "",
        "response_length": len(response),
        "label": None,
        "reward": reward,
        "loss_mask": [1] * len(response),
        "rollout_log_probs": [-1.0] * len(response),
        "remove_sample": False,
        "status": "completed",
        "metadata": {},
    }
    return sample | fields


def save_slime(path, samples, rollout_id=7):
    torch.save({"rollout_id": rollout_id, "samples": samples}, path)
    return path


PLAIN = [
    slime_sample(0, 0, P, [12, 13], 1.0),
    slime_sample(0, 1, P, [14, 15, 16], 0.0),
    slime_sample(1, 2, Q, [17], 0.0),
    slime_sample(1, 3, Q, [18, 19], 1.0),
]
FAN_OUT = [
    slime_sample(0, 0, P, [12, 13], 1.0, rollout_id=0),
    slime_sample(0, 1, [*P, 12, 13, 20], [21, 22], 1.0, rollout_id=0),
    slime_sample(0, 2, P, [14, 15, 16], 0.0, rollout_id=1),
    slime_sample(1, 3, Q, [17], 0.0, rollout_id=2),
    slime_sample(1, 4, Q, [18, 19], 1.0, rollout_id=3),
]
# samples, and rollouts of every group
SLIME = {
    "an id that is null": (PLAIN, [[0, 1], [0, 1]]),
    "no id": (
        [{k: v for k, v in s.items() if k != "rollout_id"} for s in PLAIN],
        [[0, 1], [0, 1]],
    ),
    "an id of every rollout": ([s | {"rollout_id": s["index"]} for s in PLAIN], [[0, 1], [0, 1]]),
    "the id of the file among them": (
        [s | {"rollout_id": 5 + s["index"]} for s in PLAIN],
        [[0, 1], [0, 1]],
    ),
    "fan-out": (FAN_OUT, [[0, 0, 1], [0, 1]]),
    "siblings that keep the index": (
        [FAN_OUT[0], FAN_OUT[1] | {"index": 0}, *FAN_OUT[2:]],
        [[0, 0, 1], [0, 1]],
    ),
    "siblings that are equal": ([FAN_OUT[0], *FAN_OUT], [[0, 0, 0, 1], [0, 1]]),
    "an id on some": (
        [FAN_OUT[0], FAN_OUT[1], FAN_OUT[2] | {"rollout_id": None}, *FAN_OUT[3:]],
        [[0, 0, 1], [0, 1]],
    ),
}
