"""What is optimised: logprobs, advantages, policy losses and their aggregation."""

from .logprobs import vocab_parallel_logprobs
from .predictors import gather_predictors

__all__ = ["gather_predictors", "vocab_parallel_logprobs"]
