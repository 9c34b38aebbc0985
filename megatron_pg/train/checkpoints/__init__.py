"""What a run leaves in its folder, and how it goes on from there."""

from .checkpoints import Checkpoints, is_distributed
from .progress import Best, Progress, course_settings
from .resume import resume_run
from .run_folder import hold_folders, write_atomically, writing

__all__ = [
    "Best",
    "Checkpoints",
    "Progress",
    "course_settings",
    "hold_folders",
    "is_distributed",
    "resume_run",
    "write_atomically",
    "writing",
]
