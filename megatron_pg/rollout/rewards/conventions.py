"""How a reward is called: the three forms that users bring, told apart by their arguments.

==========  ===========================================================  ====================
convention  called as                                                    per call
==========  ===========================================================  ====================
ours        ``f(prompt, response)``                                      one sample
verl's      ``f(data_source, solution_str, ground_truth, extra_info)``   one sample
TRL's       ``f(prompts, completions, completion_ids, **columns)``       all samples of a step
==========  ===========================================================  ====================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from ..values import Prompt, Response
from .calling import Call

# Columns that TRL does not pass on, since it makes them itself.
_OWN_COLUMNS = ("prompt", "completion", "completion_ids")
# Where a row does not say where it comes from; rewards that tell data sets apart refuse it.
_UNKNOWN_SOURCE = "unknown"


class Convention(Protocol):
    """A way to call a reward."""

    @property
    def is_batched(self) -> bool:
        """Whether a call takes all samples and returns a list."""
        ...

    @property
    def modules(self) -> Sequence[str]:
        """Modules that hold the types of the arguments."""
        ...

    def calls(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Call]:
        """The calls that judge the responses, in their order."""
        ...

    def missing(self, prompt: Prompt) -> list[str]:
        """Arguments that the reward needs and such a prompt does not have."""
        ...


@dataclass(frozen=True)
class PairConvention:
    """Ours: a prompt and one of its responses."""

    kwargs: Mapping[str, Any]
    is_batched = False
    modules = ("megatron_pg.rollout",)

    def calls(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Call]:
        """See ``Convention``."""
        return [Call((p, r), dict(self.kwargs)) for p, r in zip(prompts, responses)]

    def missing(self, prompt: Prompt) -> list[str]:
        """See ``Convention``."""
        return []


@dataclass(frozen=True)
class VerlConvention:
    """verl's ``compute_score``; ``data_source`` is "unknown" where a row does not say it."""

    parameters: Parameters
    kwargs: Mapping[str, Any]
    is_batched = False
    modules = ()

    def calls(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Call]:
        """See ``Convention``."""
        return [
            Call(kwargs=self.parameters.taken(self._offered(p, r.text)) | dict(self.kwargs))
            for p, r in zip(prompts, responses)
        ]

    def missing(self, prompt: Prompt) -> list[str]:
        """See ``Convention``."""
        return self.parameters.lacking({**self._offered(prompt, ""), **self.kwargs})

    def _offered(self, prompt: Prompt, text: str) -> dict[str, Any]:
        metadata = prompt.metadata
        offered = {
            "data_source": metadata.get("data_source", _UNKNOWN_SOURCE),
            "solution_str": text,
            "extra_info": metadata.get("extra_info") or {},
        }
        return offered | ({"ground_truth": metadata["answer"]} if "answer" in metadata else {})


@dataclass(frozen=True)
class TrlConvention:
    """TRL's: lists of all samples, and the columns of their rows by name.

    Of a prompt that was given as chat messages the prompt is these, and the completion a list of
    one message; of any other they are text.
    """

    parameters: Parameters
    kwargs: Mapping[str, Any]
    is_batched = True
    modules = ()

    def calls(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Call]:
        """See ``Convention``."""
        offered: dict[str, Any] = {
            name: [prompt.metadata.get(name) for prompt in prompts]
            for name in dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
            if name not in _OWN_COLUMNS
        }
        offered["prompts"] = [p.text if p.messages is None else list(p.messages) for p in prompts]
        offered["completions"] = [
            r.text if p.messages is None else [{"role": "assistant", "content": r.text}]
            for p, r in zip(prompts, responses)
        ]
        offered["completion_ids"] = [response.response_ids.tolist() for response in responses]
        return [Call(kwargs=self.parameters.taken(offered) | dict(self.kwargs))]

    def missing(self, prompt: Prompt) -> list[str]:
        """See ``Convention``."""
        columns = set(prompt.metadata) - set(_OWN_COLUMNS)
        own = {"prompts", "completions", "completion_ids"}
        return self.parameters.lacking(columns | own | set(self.kwargs))


@dataclass(frozen=True)
class Parameters:
    """What a function can be given by name.

    Attributes:
        names: all of them, in order.
        required: those without a default.
        takes_all: whether it has ``**kwargs``.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool

    @staticmethod
    def of(function: Callable[..., Any]) -> Parameters:
        """Raises ValueError where Python does not know them, as of some built-in functions."""
        found = inspect.signature(function).parameters.values()
        named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return Parameters(
            names=tuple(p.name for p in named),
            required=tuple(p.name for p in named if p.default is p.empty),
            takes_all=any(p.kind is p.VAR_KEYWORD for p in found),
        )

    def taken(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What of ``offered`` the function takes."""
        return {k: v for k, v in offered.items() if self.takes_all or k in self.names}

    def lacking(self, given: Any) -> list[str]:
        """Required names that are not in ``given``."""
        return [name for name in self.required if name not in given]


def find_convention(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Convention:
    """The convention of a reward, by the names of its arguments.

    Args:
        function: the reward.
        kwargs: further arguments of every call.

    Raises:
        ValueError: if it is none of them, or if it does not take ``kwargs``.
    """
    try:
        parameters = Parameters.of(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its arguments are not known ({error}); wrap it in a function") from error
    names = parameters.names
    convention: Convention
    if "completions" in names:
        convention = TrlConvention(parameters, kwargs)
    elif "solution_str" in names:
        convention = VerlConvention(parameters, kwargs)
        others = ("data_source", "solution_str", "ground_truth", "extra_info", *kwargs)
        unknown = [name for name in parameters.required if name not in others]
    elif names[:2] == ("prompt", "response"):
        convention = PairConvention(kwargs)
        unknown = [
            name for name in parameters.required if name not in ("prompt", "response", *kwargs)
        ]
    else:
        raise ValueError(f"takes ({', '.join(names)}), {_NONE_OF_THEM}")
    if not convention.is_batched and unknown:
        raise ValueError(f"needs {', '.join(unknown)}, which nothing gives it; see kwargs")
    if problems := list(_kwargs_problems(parameters, kwargs)):
        raise ValueError("; ".join(problems))
    return convention


def _kwargs_problems(parameters: Parameters, kwargs: Mapping[str, Any]) -> Iterator[str]:
    for name in kwargs:
        if name in _GIVEN:
            yield f"kwargs has {name!r}, which every call gives"
        elif not parameters.takes_all and name not in parameters.names:
            close = get_close_matches(name, parameters.names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"kwargs has {name!r}, which it does not take{hint}"


_GIVEN = (
    *("prompt", "response", "data_source", "solution_str", "ground_truth", "extra_info"),
    *("prompts", "completions", "completion_ids"),
)
_NONE_OF_THEM = (
    "which is none of f(prompt, response), verl's compute_score(data_source, solution_str, "
    "ground_truth, extra_info) and TRL's f(prompts, completions, **columns)"
)
