"""Where prompts come from: files, and tasks that make them."""

from .file_prompts import FilePrompts, HeldOutPrompts, TooLong
from .tasks import ANSWER_EXTRACTORS, ReasoningGymTask

__all__ = ["ANSWER_EXTRACTORS", "FilePrompts", "HeldOutPrompts", "ReasoningGymTask", "TooLong"]
