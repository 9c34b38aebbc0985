"""Write the quick start's sums as prompts files: ``train.jsonl`` and ``val.jsonl``.

A row is ``{"question": ..., "answer": ..., "data_source": ...}``; no question of one file is in the
other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_pg.rollout import Prompt, ReasoningGymTask


class Characters:
    """The tokens do not matter here."""

    eos_token_id: int | None = None
    chat_template: Any = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A token per character."""
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The characters again."""
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """There is none."""
        raise NotImplementedError


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="their folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    task = ReasoningGymTask(tokenizer=Characters())
    write(args.out / "train.jsonl", task.prompts(0, 400))
    write(args.out / "val.jsonl", task.held_out().prompts(0, 22))


def write(path: Path, prompts: Sequence[Prompt]) -> None:
    """One row per prompt."""
    rows = (
        {"question": p.metadata["question"], "answer": p.metadata["answer"], "data_source": "sums"}
        for p in prompts
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
