"""verl's batches: groups of one turn and of several, of ragged lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import left_right_2_no_padding

VOCAB = 64


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a verl batch."""

    uid: str
    prompt: Tensor
    response: Tensor
    response_mask: Tensor


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, VOCAB, (count,), generator=generator)


def single_turn(uid: str, prompt_len: int, response_lens: list[int], seed: int) -> list[Row]:
    """The samples of one prompt."""
    g = torch.Generator().manual_seed(seed)
    prompt = tokens(prompt_len, g)
    responses = [tokens(n, g) for n in response_lens]
    return [Row(uid, prompt.clone(), r, torch.ones(len(r), dtype=torch.long)) for r in responses]


def multi_turn(uid: str, seed: int) -> list[Row]:
    """Two sessions of two and three turns, each turn a row; one has a tool's answer untrained."""
    g = torch.Generator().manual_seed(seed)
    first = tokens(21, g)
    rows = []
    for turns in (2, 3):
        history = first
        for _ in range(turns):
            response = tokens(9, g)
            mask = torch.ones(9, dtype=torch.long)
            mask[3:6] = 0
            rows.append(Row(uid, history, response, mask))
            history = torch.cat([history, response, tokens(5, g)])
    return rows


def ragged(rank: int) -> list[Row]:
    """Eight samples: three groups of one turn, one of which is a pair of equal samples."""
    star = single_turn(f"a{rank}", 40, [9, 13, 5, 11], seed=10 * rank + 1)
    short = single_turn(f"b{rank}", 7, [12, 3], seed=10 * rank + 2)
    equal = single_turn(f"c{rank}", 19, [6], seed=10 * rank + 3) * 2
    mixed = [star[0], short[0], equal[0], star[1], star[2], equal[1], short[1], star[3]]
    return mixed


def turns(rank: int) -> list[Row]:
    """Eight rows: five turns of an agent, three samples of a prompt."""
    star = single_turn(f"d{rank}", 25, [8, 4, 10], seed=10 * rank + 4)
    agent = multi_turn(f"e{rank}", seed=10 * rank + 5)
    return [agent[3], star[0], agent[0], agent[2], star[1], agent[1], star[2], agent[4]]


def uneven(rank: int) -> list[Row]:
    """Two prompts, each larger than a row with its samples; on odd ranks eight short prompts."""
    if rank % 2 == 0:
        pair = [single_turn(f"f{rank}.{i}", 50, [38, 30, 35, 33], 10 * rank + i) for i in (6, 7)]
        return [row for rows in zip(*pair) for row in rows]
    return [*(single_turn(f"h{rank}.{i}", 20, [3 + i], seed=100 * rank + i)[0] for i in range(8))]


BATCHES = {"ragged": ragged, "turns": turns, "uneven": uneven}


def make_batch(rows: list[Row], world_batch: int, seed: int, **non_tensors: Any) -> TensorDict:
    """As verl's worker hands it to its engine; ``uids`` gives the names of the groups."""
    g = torch.Generator().manual_seed(seed)

    def per_token(scale: float, shift: float) -> Tensor:
        return jagged([shift + scale * torch.randn(len(r.response), generator=g) for r in rows])

    data = TensorDict(
        {
            "input_ids": jagged([torch.cat([r.prompt, r.response]) for r in rows]),
            "prompts": jagged([r.prompt for r in rows]),
            "responses": jagged([r.response for r in rows]),
            "response_mask": jagged([r.response_mask for r in rows]),
            "loss_mask": jagged([r.response_mask for r in rows]),
            "old_log_probs": per_token(0.1, -4.2),
            "ref_log_prob": per_token(0.1, -4.2),
            "advantages": per_token(1.0, 0.0),
        },
        batch_size=[len(rows)],
    )
    settings: dict[str, Any] = dict(
        use_dynamic_bsz=True,
        max_token_len_per_gpu=512,
        temperature=1.0,
        global_batch_size=world_batch,
        calculate_entropy=True,
    )
    settings = {n: v for n, v in (settings | non_tensors).items() if v is not None}
    if settings.pop("uids", False):
        tu.assign_non_tensor_stack(data, "uid", [r.uid for r in rows])
    temperatures = settings.get("temperature")
    if isinstance(temperatures, Tensor):
        data["temperature"] = settings.pop("temperature")
    tu.assign_non_tensor(data, **settings)
    return data


def padded(data: TensorDict) -> TensorDict:
    """The same as verl's older trainer hands it over: all but the tokens and positions padded."""
    prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
    widths = [max(map(len, parts)) for parts in (prompts, responses)]
    ends = [(widths[0] - len(p), widths[1] - len(r)) for p, r in zip(prompts, responses)]
    whole = data["input_ids"].unbind()
    fields = dict(
        input_ids=torch.stack([pad(x, own) for x, own in zip(whole, ends)]),
        attention_mask=torch.stack([pad(torch.ones_like(x), own) for x, own in zip(whole, ends)]),
        position_ids=torch.stack([pad(torch.arange(len(x)), own) for x, own in zip(whole, ends)]),
        prompts=torch.stack([pad(x, (left, 0)) for x, (left, _) in zip(prompts, ends)]),
    )
    for name in ("responses", "response_mask", "old_log_probs", "ref_log_prob", "advantages"):
        parts = zip(data[name].unbind(), ends)
        fields[name] = torch.stack([pad(x, (0, right)) for x, (_, right) in parts])
    found = data.copy()
    del found["loss_mask"]
    return left_right_2_no_padding(found.update(fields))


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)
