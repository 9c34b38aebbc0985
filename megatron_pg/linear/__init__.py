"""Recurrent layers over prefix forests: every shared token once, a state forked at every branch."""

from .convolution import forked_convolution
from .copies import Copies
from .depths import CHUNK_TOKENS, Batch, Depth
from .forks import Forks, of_layout
from .histories import Continued, Tails, continued, tails_of
from .scan import BatchScan, Scan, Scanned, forked_scan, in_batches
from .state_space import state_space_scan

__all__ = [
    "CHUNK_TOKENS",
    "Batch",
    "BatchScan",
    "Continued",
    "Copies",
    "Depth",
    "Forks",
    "Scan",
    "Scanned",
    "Tails",
    "continued",
    "forked_convolution",
    "forked_scan",
    "in_batches",
    "of_layout",
    "tails_of",
    "state_space_scan",
]
