"""Whether a response's mathematical expression is the known one, by math-verify."""

from __future__ import annotations

from typing import Any

from ..values import Prompt, Response


def math_score(solution_str: str, ground_truth: Any) -> float:
    """1.0 if the last mathematical expression of a text equals the answer, else 0.0.

    Call it from the main thread: the library limits its own time by signals.

    Args:
        solution_str: the response.
        ground_truth: a number, or an expression as plain text or LaTeX, with or without its
            dollars or box.

    Raises:
        ImportError: if math-verify is not installed.
        ValueError: if the answer holds no expression.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            'the math reward needs math-verify: pip install "megatron_pg[math]"'
        ) from error
    answer = str(ground_truth)
    # Of an expression without dollars only a number in it would be found.
    is_marked = "$" in answer or "\\boxed" in answer
    expected = parse(answer if is_marked else f"${answer}$")
    if not expected:
        raise ValueError(f"the answer {answer!r} holds no mathematical expression")
    return float(verify(expected, parse(solution_str)))


def math_verify_reward(prompt: Prompt, response: Response) -> float:
    """``math_score`` of a response and ``metadata["answer"]``.

    Raises:
        ImportError: if math-verify is not installed.
        ValueError: if the prompt has no answer, or none with an expression.
    """
    if "answer" not in prompt.metadata:
        raise ValueError(f'prompt {prompt.prompt_id!r} has no metadata["answer"] to verify against')
    return math_score(response.text, prompt.metadata["answer"])
