"""reasoning-gym tasks: determinism, splits, prompts, scoring."""

import sys

import pytest

from megatron_pg.rollout import ReasoningGymTask
from megatron_pg.rollout.prompts.tasks import answer_tag, last_number, whole_text

from .helpers import CharTokenizer, make_response

pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')


def task(**fields):
    return ReasoningGymTask(tokenizer=CharTokenizer(), **fields)


def questions(some_task, count, start=0):
    return [prompt.metadata["question"] for prompt in some_task.prompts(start, count)]


def test_same_seed_same_prompts_in_any_order_of_asking():
    whole = questions(task(seed=4), 40)
    assert questions(task(seed=4), 15, start=25) == whole[25:]
    assert questions(task(seed=5), 40) != whole
    assert len(set(whole)) > 20


def test_prompts_repeat_after_size_under_new_ids():
    prompts = task(size=3).prompts(0, 6)
    assert [p.metadata["question"] for p in prompts[:3]] == [
        p.metadata["question"] for p in prompts[3:]
    ]
    assert len({prompt.prompt_id for prompt in prompts}) == 6


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic", "leg_counting"])
def test_held_out_questions_are_never_trained_on(name):
    config = {"config": {}} if name != "chain_sum" else {}
    train = set(questions(task(name=name, **config), 300))
    held_out = set(questions(task(name=name, **config).held_out(), 60))
    other_seed = set(questions(task(name=name, seed=99, **config), 300))
    assert len(train) > 100
    assert len(held_out) > 10
    assert not held_out & (train | other_seed)


def test_default_task_is_one_digit_sums():
    for prompt in task().prompts(0, 50):
        a, operator, b = prompt.metadata["entry"]["metadata"]["expression"].split()
        assert operator in "+-"
        assert 0 <= int(a) <= 9
        assert 0 <= int(b) <= 9
        assert int(prompt.metadata["answer"]) == eval(f"{a}{operator}{b}")


def test_right_and_wrong_answers():
    reward = task()
    (prompt,) = reward.prompts(0, 1)
    answer = prompt.metadata["answer"]
    assert reward(prompt, make_response(f"1 + 1 is not it. The answer is {answer}.")) == 1.0
    assert reward(prompt, make_response(str(int(answer) + 1))) == 0.0
    assert reward(prompt, make_response("I do not know.")) == 0.0
    assert reward(prompt, make_response("")) == 0.0
    # Contains the right digits, which the data set itself rewards in part.
    assert reward(prompt, make_response(f"9{answer.lstrip('-')}")) == 0.0
    assert 0 < task(partial_credit=True)(prompt, make_response(f"{answer}0")) < 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5 - 8 = -3", "-3"),
        ("it is 5-8", "8"),
        ("1,234.50 in all", "1,234.50"),
        ("3.", "3"),
        ("none", None),
        ("(-7)", "-7"),
    ],
)
def test_last_number(text, found):
    assert last_number(text) == found


def test_other_extractors():
    assert answer_tag("<answer>1</answer> no, <answer> 2\n</answer>") == "2"
    assert answer_tag("2") is None
    assert whole_text(" 4 \n") == "4"
    assert whole_text(" ") is None


def test_prompt_goes_through_template_and_chat_template():
    tokenizer = CharTokenizer()
    tokenizer.chat_template = "present"
    chat = ReasoningGymTask(
        tokenizer=tokenizer, template="Q: {question}", system_prompt="Be brief."
    )
    (prompt,) = chat.prompts(0, 1)
    text = tokenizer.decode(prompt.prompt_ids.tolist())
    assert text == f"<system>Be brief.<user>Q: {prompt.metadata['question']}<assistant>"
    (plain,) = task(template="Q: {question}", system_prompt="Be brief.").prompts(0, 1)
    assert tokenizer.decode(plain.prompt_ids.tolist()).startswith("Be brief.\nQ: ")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "no_such_task"}, "no_such_task"),
        ({"config": {"no_such_setting": 1}}, "no_such_setting"),
        ({"config": {"max_terms": 0}}, "max_terms"),
        ({"config": {"seed": 1}}, "config sets 'seed'"),
        ({"extractor": "guess"}, "extractor='guess' is none of"),
        ({"split": "test"}, "split='test'"),
        ({"held_out_share": 0.0}, "held_out_share=0.0"),
        ({"size": 0}, "size=0"),
        ({"template": "no question"}, "must contain"),
    ],
)
def test_task_refuses(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        task(**fields)


def test_task_with_too_few_questions_for_a_split():
    one_question = task(name="chain_sum", config={"min_terms": 1, "max_terms": 1, "max_digits": 1})
    answers = []
    for split in (one_question, one_question.held_out()):
        try:
            answers.append({p.metadata["answer"] for p in split.prompts(0, 5)})
        except ValueError as error:
            assert "too few questions" in str(error)
            answers.append(set())
    assert not answers[0] & answers[1]


def test_task_names_its_extra_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"megatron_pg\[rollout\]"):
        task()
