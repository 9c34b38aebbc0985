"""Where a run's groups come from, on all ranks together."""

from .evaluate import Evaluation, evaluate
from .recording import Recording, read_recording, share_recording
from .sampling import open_sampling
from .shared_stream import SharedStream
from .stream import make_stream

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
