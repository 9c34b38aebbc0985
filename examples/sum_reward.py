"""A reward as verl calls it: whether the last number of a response is the answer."""

from __future__ import annotations

import re
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """1.0 for the right number; how many responses name one at all is a metric."""
    # A minus after a digit is an operator, not a sign.
    numbers = re.findall(r"(?:(?<!\d)-)?\d+", solution_str)
    is_right = bool(numbers) and int(numbers[-1]) == int(ground_truth)
    return {"score": float(is_right), "has_number": float(bool(numbers))}
