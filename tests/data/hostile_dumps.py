"""Hostile dumps of other trainers: slime with token ids, verl and TRL with text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from tests.data.hostile_rows import at, uniform
from tests.data.hostile_samples import VOCAB, Input, Known, make_input

BOS, EOS = 1, 2

# field that is named, changes of the sample
SLIME_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "length beyond": ("response_length", lambda s: {"response_length": len(s["tokens"])}),
    "length negative": ("response_length", lambda s: {"response_length": -1}),
    "length text": ("response_length", lambda s: {"response_length": "3"}),
    "length flag": ("response_length", lambda s: {"response_length": True}),
    "tokens text": ("tokens", lambda s: {"tokens": "abc"}),
    "tokens null": ("tokens", lambda s: {"tokens": None}),
    "token beyond": ("response_ids", lambda s: {"tokens": at(s["tokens"], -1, VOCAB)}),
    "token point": ("prompt_ids", lambda s: {"tokens": at(s["tokens"], 0, 5.0)}),
    "token huge": ("prompt_ids", lambda s: {"tokens": at(s["tokens"], 0, 10**300)}),
    "reward null": ("reward", lambda s: {"reward": None}),
    "reward parts": ("reward", lambda s: {"reward": {"a": 1.0, "b": 2.0}}),
    "reward nan": ("reward", lambda s: {"reward": math.nan}),
    "status": ("status", lambda s: {"status": "pending"}),
    "status number": ("status", lambda s: {"status": 3}),
    "mask": ("loss_mask", lambda s: {"loss_mask": [1] * (s["response_length"] + 1)}),
    "logprobs of all tokens": (
        "rollout_logprobs",
        lambda s: {"rollout_log_probs": [-0.1] * len(s["tokens"])},
    ),
    "placeholder": (
        "rollout_logprobs",
        lambda s: {"rollout_log_probs": [-9999.0] * s["response_length"]},
    ),
    "group point": ("group_index", lambda s: {"group_index": 1.5}),
    "group huge": ("group_index", lambda s: {"group_index": 10**300}),
    "rollout list": ("rollout_id", lambda s: {"rollout_id": [3]}),
}


def slime_input(seed: int, folder: Path) -> tuple[Input, list[Path]]:
    made = make_input(seed, has_rollouts=True, has_ids=True)
    files = [folder / f"{i}.pt" for i in range(len(made.samples))]
    names_rollouts, names_rollout = made.chance(0.5), made.chance(0.8)
    for number, (file, known) in enumerate(zip(files, made.samples)):
        ids: dict[Any, int] = {}
        samples = []
        for place, s in enumerate(known):
            s.weight = None  # slime writes none
            key = place if s.rollout is None else s.rollout
            sample = {
                "group_index": s.group,
                "index": place,
                "tokens": s.prompt + s.response,
                "response_length": len(s.response),
                "reward": s.reward,
                "loss_mask": s.mask,
                "rollout_log_probs": s.logprobs,
                "status": s.status,
                "remove_sample": False,
                "metadata": {"turns": place},
                "spec_info": {},
            }
            if names_rollouts or s.rollout is not None:
                sample["rollout_id"] = ids.setdefault(key, 100 + place)
                if s.rollout is not None and made.chance(0.5):
                    sample["index"] = list(ids).index(key) + 1000
            elif made.chance(0.5):
                sample["rollout_id"] = None
            if s.status == "aborted":
                sample |= {"reward": made.pick(None, 0.0), "loss_mask": None}
                sample["status"] = made.pick("aborted", "failed")
                siblings = [t for t in known if t.group == s.group and t is not s]
                is_first = siblings and siblings[0].prompt == s.prompt
                if not s.response and is_first and made.chance(0.5):
                    sample["tokens"] = []
            elif all(s.mask) and made.chance(0.5):
                sample["loss_mask"] = None
            elif not any(s.mask) and made.chance(0.5):
                sample |= {"loss_mask": None, "remove_sample": True}
            if sample["tokens"] and made.chance(0.2):
                sample["tokens"] = torch.tensor(sample["tokens"])
            samples.append(sample)
        if made.fault is None and made.chance(0.5):
            living = [i for i, s in enumerate(known) if s.status != "aborted"]
            if living:
                where = made.rng.choice(living)
                name, change = SLIME_FAULTS[made.rng.choice(sorted(SLIME_FAULTS))]
                tokens = samples[where]["tokens"]
                samples[where]["tokens"] = tokens if isinstance(tokens, list) else tokens.tolist()
                samples[where] |= change(samples[where])
                made.fault = (f"{file}, sample {where}: field {name!r}",)
        content = {"samples": samples} | ({"rollout_id": number} if names_rollout else {})
        torch.save(content, file)
    return made, files


WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(5, VOCAB))]


class WordTokenizer:
    """One token per word, BOS before and EOS behind where they are asked for."""

    eos_token_id = EOS
    bos_token = "<bos>"

    def __init__(self, writes_bos: bool) -> None:
        self.writes_bos = writes_bos

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [WORDS.index(word) if word in WORDS else 0 for word in text.split()]
        return [BOS, *ids, EOS] if add_special_tokens else ids

    def apply_chat_template(self, chat: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        turns = "".join(f"<{m['role']}> {m['content']} " for m in chat)
        return ("<bos> " if self.writes_bos else "") + turns + "<assistant>"


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def text_input(seed: int, folder: Path) -> tuple[Input, list[Path], WordTokenizer]:
    """Prompts plain, rendered or as messages; verl's, TRL's and our own rows."""
    # verl's sessions may have several outputs.
    has_uids = seed % 4 == 0
    made = make_input(seed, has_rollouts=has_uids, has_ids=has_uids)
    tokenizer = WordTokenizer(made.chance(0.5))
    kind = "verl" if has_uids else made.pick("own", "verl", "trl")
    form = (
        made.pick("plain", "rendered", "messages")
        if kind == "own"
        else made.pick("plain", "rendered")
    )
    suffix = ".parquet" if kind == "trl" else ".jsonl"
    files = [folder / f"{i}{suffix}" for i in range(len(made.samples))]
    parts = made.pick(1, 2) if kind == "trl" else 1
    if parts == 2:
        made.options["reward_key"] = ["acc", "form"]
    for file, known in zip(files, made.samples):
        rows = []
        for s in known:
            s.prompt = [i if i > 4 else 9 for i in s.prompt]
            s.response = [i if i > 4 else 9 for i in s.response]
            if s.status == "aborted":
                s.response = []
            s.mask, s.logprobs, s.weight = [bool(s.response)] * len(s.response), None, None
            s.reward = made.pick(0.0, 1.0, 0.5)
            chat = [{"role": "user", "content": text_of(s.prompt)}]
            text = text_of(s.prompt)
            if form == "plain":
                s.prompt = [BOS, *s.prompt]
            else:
                text = tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                )
                s.prompt = [BOS] * tokenizer.writes_bos + [3, *s.prompt, 4]
            rows.append(text_row(kind, parts, chat if form == "messages" else text, s))
        sessions = name_outputs(made, known, rows) if has_uids else []
        if made.fault is None and made.chance(0.4):
            living = [i for i, s in enumerate(known) if s.response]
            if living:
                where = made.rng.choice(living)
                place = f"row {where}" if kind == "trl" else f"line {where + 1}"
                name = TEXT_FAULTS[made.rng.randrange(len(TEXT_FAULTS))](kind, rows, where)
                for session in sessions if name == "reward" else []:
                    if where in session:
                        rows[session[-1]]["score"] = None
                made.fault = (f"{file}, {place}: field {name!r}",)
        if kind == "trl":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(uniform(rows)), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made, files, tokenizer


def text_row(kind: str, parts: int, prompt: Any, sample: Known) -> dict[str, Any]:
    response, reward = text_of(sample.response), sample.reward
    if kind == "own":
        return {"prompt": prompt, "response": response, "reward": reward, "group_id": sample.group}
    if kind == "verl":
        return {"input": prompt, "output": response, "score": reward, "step": 1, "gts": None}
    row = {"step": 1, "prompt": prompt, "completion": response, "acc": reward, "advantage": 0.5}
    if parts == 2:
        # The part that does not apply to a sample is null.
        row |= {"acc": reward - 0.25, "form": 0.25} if reward else {"acc": 0.0, "form": None}
    return row


def name_outputs(made: Input, known: list[Known], rows: list[dict[str, Any]]) -> list[list[int]]:
    """Rows of every session, which get their ``uid``; the last one's score is the reward of all."""
    members: dict[Any, list[int]] = {}
    for place, s in enumerate(known):
        members.setdefault((s.group, s.rollout or (place,)), []).append(place)
    for number, ((group, _), places) in enumerate(members.items()):
        for index, place in enumerate(places):
            rows[place]["uid"] = f"{'p_' * (group % 2)}{group}_{number}_{index + 9}"
            if index + 1 < len(places):
                rows[place]["score"] = made.pick(None, -7.0)
            known[place].reward = known[places[-1]].reward
    return list(members.values())


NAMES = {
    "own": ("prompt", "response", ("reward",)),
    "verl": ("input", "output", ("score",)),
    "trl": ("prompt", "completion", ("acc", "form")),
}


def no_reward(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    for name in NAMES[kind][2]:
        if name in rows[where]:
            rows[where][name] = None
    return "reward"


def no_response(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    rows[where][NAMES[kind][1]] = None
    return "response"


def no_prompt(kind: str, rows: list[dict[str, Any]], where: int) -> str:
    rows[where][NAMES[kind][0]] = "" if isinstance(rows[where][NAMES[kind][0]], str) else []
    return "prompt"


TEXT_FAULTS = [no_reward, no_response, no_prompt]
