"""Where a run's groups come from, on all ranks together."""

from .evaluate import Evaluation, check_held_out, evaluate
from .own_rewards import own_rewards
from .recording import Recording, read_recording, share_recording, unfit_groups
from .replay import routes_of_run
from .sampling import Sampling, open_sampling
from .shared_stream import SharedStream, gather_groups
from .step_groups import first_step_groups, next_step_groups
from .stream import make_stream

__all__ = [
    "Evaluation",
    "Recording",
    "Sampling",
    "SharedStream",
    "check_held_out",
    "evaluate",
    "first_step_groups",
    "gather_groups",
    "make_stream",
    "next_step_groups",
    "open_sampling",
    "own_rewards",
    "read_recording",
    "routes_of_run",
    "share_recording",
    "unfit_groups",
]
