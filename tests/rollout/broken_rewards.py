"""A module that can be imported in the process of the tests alone."""

import sys

if "pytest" not in sys.modules:
    raise RuntimeError("no licence here")


def score(data_source: str, solution_str: str) -> float:
    return 1.0
