"""Prompts and responses as text, against the ids of the tokenizer's own template."""

from __future__ import annotations

import json

import pytest

from megatron_pg.data import read_rollouts
from megatron_pg.data.reading.text import TextEncoder

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "user", "assistant", ":"]
WORDS += ["system", "be", "short", "what", "is", "one", "three", "four"]
BOS, EOS = 1, 2

TEMPLATES = {
    "writes bos": "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "bos and a blank": "{{ bos_token }} {% for m in messages %}{{ m.role }} : {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}",
    "special tokens without bos": "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "words alone": "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}",
    "no end": "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}",
    "system of its own": "{% if messages[0].role != 'system' %}<system>be short{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no system role": "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}"
    "{% endif %}{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{% endfor %}"
    "<assistant>",
}
# What encode() adds around a text.
ADDS = {"nothing": "$A", "bos": "<bos> $A", "bos and eos": "<bos> $A <eos>", "eos": "$A <eos>"}
USER = {"role": "user", "content": "what is one"}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "be short"}, USER],
    "turns": [USER, {"role": "assistant", "content": "three"}, USER],
}


def make_tokenizer(adds: str, template: str | None):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=ADDS[adds], special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def own_rows(path, prompt, responses):
    rows = [{"prompt": prompt, "response": r, "reward": i} for i, r in enumerate(responses)]
    path = path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl_rows(path, prompt, responses):
    rows = [{"input": prompt, "output": r, "score": i, "step": 1} for i, r in enumerate(responses)]
    path = path / "1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trl_rows(path, prompt, responses):
    rows = [
        {"step": 1, "prompt": prompt, "completion": r, "acc": float(i), "advantage": 0.0}
        for i, r in enumerate(responses)
    ]
    path = path / "completions.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


SOURCES = {"own": own_rows, "verl": verl_rows, "trl": trl_rows}


def prompts_of(path, tokenizer, **options):
    (group,) = read_rollouts(path, tokenizer=tokenizer, **options)
    return [sample.prompt_ids.tolist() for sample in group.samples], group


RENDERED = [(t, c) for t in TEMPLATES for c in CHATS if (t, c) != ("no system role", "system")]


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize(("template", "chat"), RENDERED)
def test_a_rendered_prompt_has_the_tokens_of_the_template(tmp_path, template, adds, chat):
    tokenizer = make_tokenizer(adds, TEMPLATES[template])
    options = {"add_generation_prompt": True}
    want = tokenizer.apply_chat_template(CHATS[chat], tokenize=True, return_dict=False, **options)
    rendered = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, **options)
    assert want.count(BOS) == ("bos" in template.split("without")[0]) and EOS not in want
    for name, write in SOURCES.items():
        prompts, _ = prompts_of(write(tmp_path, rendered, ["three", "four"]), tokenizer)
        assert prompts == [want] * 2, name
    # The messages themselves are the same prompt.
    assert prompts_of(own_rows(tmp_path, CHATS[chat], ["three"]), tokenizer)[0] == [want]


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("adds", ADDS)
def test_a_plain_prompt_is_opened_as_a_text_and_not_ended(tmp_path, adds, template):
    tokenizer = make_tokenizer(adds, template and TEMPLATES[template])
    want = [BOS] * ("bos" in adds) + [WORDS.index(w) for w in ("what", "is", "one")]
    for write in SOURCES.values():
        assert prompts_of(write(tmp_path, "what is one", ["three"]), tokenizer)[0] == [want]


@pytest.mark.parametrize("adds", ADDS)
def test_a_prompt_whose_first_token_was_cut_off_gets_it_back(tmp_path, adds):
    tokenizer = make_tokenizer(adds, TEMPLATES["writes bos"])
    text = "<user>what is one<assistant>"
    want = [WORDS.index(w) for w in ("<user>", "what", "is", "one", "<assistant>")]
    prompts, _ = prompts_of(own_rows(tmp_path, text, ["three"]), tokenizer)
    assert prompts == [[BOS] * ("bos" in adds) + want]


@pytest.mark.parametrize("text", ["<bos>what", " <bos> what", "\n<bos>\nwhat"])
def test_without_a_template_the_text_of_bos_decides(tmp_path, text):
    tokenizer = make_tokenizer("bos", None)
    assert prompts_of(own_rows(tmp_path, text, ["one"]), tokenizer)[0] == [[BOS, 12]]


@pytest.mark.parametrize("adds", ADDS)
def test_nothing_is_added_to_responses(tmp_path, adds):
    tokenizer = make_tokenizer(adds, TEMPLATES["writes bos"])
    three, four = WORDS.index("three"), WORDS.index("four")
    for write in SOURCES.values():
        path = write(tmp_path, "what is one", ["three", "four <eos>", ""])
        _, group = prompts_of(path, tokenizer)
        got = [sample.response_ids.tolist() for sample in group.samples]
        assert got == [[three], [four, EOS], []]
        assert [s.status for s in group.samples] == ["completed", "completed", "aborted"]
        _, group = prompts_of(path, tokenizer, append_eos=True)
        got = [sample.response_ids.tolist() for sample in group.samples]
        # A response that ended at once is the end token, where that is not dropped.
        assert got == [[three, EOS], [four, EOS], [EOS]] and group.samples[2].loss_mask.all()


def test_what_opens_a_text_stands_there_once(tmp_path):
    """Tokens that are no bos open it, and the template's arguments decide how it ends."""
    tokenizer = make_tokenizer("nothing", "<user><bos>{{ messages[0].content }} one")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<user> <bos> $A", special_tokens=[("<user>", WORDS.index("<user>")), ("<bos>", BOS)]
    )
    tokenizer.bos_token = None
    for text in ("<user><bos>what is", "<user><bos> what is", "what is"):
        got = TextEncoder(tokenizer).encode_prompt(text)
        assert got == [WORDS.index(w) for w in ("<user>", "<bos>", "what", "is")]
