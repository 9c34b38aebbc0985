"""What makes a Hugging Face folder usable besides its weights: tokenizer, templates, generation."""

from __future__ import annotations

import shutil
from pathlib import Path

SIDE_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "tekken.json", "spiece.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model"),
)
# Chat templates with a name of their own ("tool_use"), beside the default one.
CHAT_TEMPLATES = "additional_chat_templates"


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation config, those that exist.

    Raises:
        ValueError: naming a file that is a link out of the folder: a model from elsewhere could
            take any file of this machine along. Links of a hub's cache into its blobs are followed.
    """
    templates = (path.relative_to(source) for path in (source / CHAT_TEMPLATES).glob("*.jinja"))
    root = source.resolve()
    for name in (*map(Path, SIDE_FILES), *templates):
        if not (source / name).is_file():
            continue
        held = (source / name).resolve()
        is_blob = held.parent.name == "blobs" and root.is_relative_to(held.parent.parent)
        if not (held.is_relative_to(root) or is_blob):
            raise ValueError(
                f"{source / name}: a link to {held}, outside of the folder; put the file itself "
                "there if it belongs to the model"
            )
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(held, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether one of the files is there from which ``transformers`` makes a tokenizer."""
    vocabularies = (
        *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"),
        *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "tiktoken.model"),
    )
    return any((folder / name).is_file() for name in vocabularies)
