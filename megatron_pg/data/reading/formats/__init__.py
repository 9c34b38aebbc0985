"""Rollouts that other trainers write, as rows of our schema.

A converter is made for one file from all its records; it takes one record and returns a row for
``schema.RowParser``. Values that it does not understand are passed on, so that the parser names
them. Fields without a place in the schema go to ``metadata``.

===========  ==============================================  ==================================
format       written by                                      one group
===========  ==============================================  ==================================
``slime``    ``--save-debug-rollout-data`` (``torch.save``)  ``group_index`` of a rollout
``nemo_rl``  ``train_data_step*.jsonl``                      equal prompts of a file
``verl``     ``trainer.rollout_data_dir`` (text only)        equal inputs, or the ``uid`` of a step
``trl``      ``log_completions=True`` (parquet, text only)   equal prompts of a step
===========  ==============================================  ==================================

The last two hold decoded text. Tokenizing it anew need not give the tokens that were sampled (verl
and TRL drop special tokens), so their logprobs have to be recomputed.
"""

from __future__ import annotations

from .nemo_rl import nemo_rl_converter
from .record import FormatError, MakeConverter
from .slime import slime_converter
from .trl import trl_converter
from .verl import verl_converter

__all__ = ["CONVERTERS", "READS_REWARD_KEY", "FormatError"]

CONVERTERS: dict[str, MakeConverter] = {
    "slime": slime_converter,
    "nemo_rl": nemo_rl_converter,
    "verl": verl_converter,
    "trl": trl_converter,
}
# Formats whose reward may have several parts.
READS_REWARD_KEY = ("slime", "trl")
