"""Where a run's groups come from, on all ranks together."""

from .evaluate import Evaluation, evaluate
from .shared_stream import SharedStream
from .sources import Recording, make_stream, open_sampling, read_recording, share_recording

__all__ = [
    "Evaluation",
    "Recording",
    "SharedStream",
    "evaluate",
    "make_stream",
    "open_sampling",
    "read_recording",
    "share_recording",
]
