"""One YAML file for a run, and errors that name the nearest valid key."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...data import MAX_NESTING
from ...loss import (
    ADVANTAGE_ESTIMATORS,
    POLICY_LOSSES,
    register_advantage_estimator,
    register_policy_loss,
)
from ...rollout import load_callable
from .checks import config_problems, nearest, raise_problems
from .sections import TrainConfig

# Known to Megatron-LM's users, with why no run has it.
_NOT_OFFERED = {
    "parallel.overlap_param_gather": "is not offered: logprobs and samples read the output layer's "
    "weights outside of its module, whose call would wait for them; omit it",
    "parallel.tp_comm_overlap": "is not offered: its buffers are made for rows of one length; "
    "omit it",
}
# Settings of prefix groups that earlier versions had in other sections.
_MOVED = {
    "model.attention_backend": "prefix_group.attention_backend",
    "rollout.min_shared": "prefix_group.min_shared",
} | {
    f"run.{name}": f"prefix_group.{name}"
    for name in (
        "max_tokens_per_microbatch",
        "prefix_resident",
        "prefix_resident_mode",
        "max_resident_tokens",
        "logprob_chunk_tokens",
    )
}
# What YAML 1.1 reads as numbers of base 8 and 60: 010 is 8, and 1:30 is 90.
_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
# Tokens of mappings and sequences.
_OPENS = {"<block sequence start>", "<block mapping start>", "[", "{"}
_CLOSES = {"<block end>", "]", "}"}
# In place of a key, which belongs into no output and no message.
_HIDDEN = "***"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and ``section.key=value`` overrides; a section left empty is its defaults.

    Overrides apply in order. One that is a mapping sets the fields that it has and leaves the
    file's others; the empty one leaves none.

    Raises:
        ValueError: naming the file, the key and the nearest valid one, or the value and what was
            expected. One error has all unknown keys and wrong types; once there are none, one has
            all problems of the values (see ``config_problems``).
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise ValueError(f"config file {path} does not exist")
    for override in overrides:
        if "=" not in override or "." not in override.split("=")[0]:
            raise ValueError(f"override {override!r} must be section.key=value")
    try:
        problems = _text_problems(Path(path).read_text(encoding="utf-8"))
        for override in overrides:
            key, value = override.split("=", 1)
            problems += _text_problems(value, key)
        merged = OmegaConf.load(path)
        for override in overrides:
            key, value = override.split("=", 1)
            if value.replace(" ", "") == "{}":
                # A merge would leave what the file has there, as if nothing were said.
                OmegaConf.update(merged, key, {}, merge=False)
            else:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no valid YAML configuration: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no valid YAML configuration: nested too deeply") from error
    _register_own(content, problems)
    config = _read(TrainConfig, content, "", problems)
    if config is not None:
        problems += config_problems(config)
    raise_problems(f"in {path}", problems)
    assert isinstance(config, TrainConfig)
    return config


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain values, defaults included; only whether a key was given."""
    content = dataclasses.asdict(config)
    server = content["rollout"]["server"]
    server["api_key"] = None if server["api_key"] is None else _HIDDEN
    return content


def _text_problems(text: str, key: str | None = None) -> list[str]:
    """What of a YAML text would be read as something else than stands there.

    Values are not shown: one may be a server's key.

    Raises:
        ValueError: if it is nested too deeply; where the parser ends depends on the interpreter's
            stack.
    """
    from yaml import ScalarToken, scan

    problems, depth = [], 0
    for token in scan(text):
        depth += token.id in _OPENS
        depth -= token.id in _CLOSES
        if depth > MAX_NESTING:
            raise ValueError(f"nested too deeply, at most {MAX_NESTING} levels are read")
        if isinstance(token, ScalarToken) and token.plain and _OTHER_BASES.fullmatch(token.value):
            problems.append(
                f"{key or f'line {token.start_mark.line + 1}'}: YAML reads this number in base 8 "
                "or 60; write it without leading zeros and colons, or text in quotes"
            )
    return problems


def _register_own(content: Any, problems: list[str]) -> None:
    """Make losses and advantage estimators of one's own known under their ``module:name``."""
    algorithm = content.get("algorithm") if isinstance(content, Mapping) else None
    algorithm = algorithm if isinstance(algorithm, Mapping) else {}
    policy = algorithm.get("policy")
    loss = policy.get("policy_loss") if isinstance(policy, Mapping) else None
    estimator = algorithm.get("adv_estimator")

    def load(key: str, path: Any, known: Mapping[str, Any], register: Any) -> None:
        if isinstance(path, str) and ":" in path and path not in known:
            try:
                register(path)(load_callable(f"algorithm.{key}", path))
            except ValueError as error:
                problems.append(str(error))

    load("policy.policy_loss", loss, POLICY_LOSSES, register_policy_loss)
    load("adv_estimator", estimator, ADVANTAGE_ESTIMATORS, register_advantage_estimator)


def _read(cls: type, content: Any, where: str, problems: list[str]) -> Any:
    """An instance of a config dataclass, or None after noting problems."""
    if not isinstance(content, Mapping):
        problems.append(f"{where or 'the file'} must be a mapping, got {content!r}")
        return None
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    before = len(problems)
    for name, value in content.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in hints:
            moved = _MOVED.get(path)
            hint = f"; it is {moved}" if moved else nearest(str(name), list(hints))
            problems.append(f"{path} {_NOT_OFFERED.get(path, f'is unknown{hint}')}")
        elif dataclasses.is_dataclass(hints[name]):
            section = {} if value is None else value
            values[name] = _read(typing.cast(type, hints[name]), section, path, problems)
        else:
            values[name] = convert(hints[name], value, path, problems)
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """The value as the type that ``hint`` names, or None after noting a problem."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if _is_a(option, value):
            return tuple(value) if typing.get_origin(option) is tuple else value
        if option is float and _is_number(value):
            # YAML reads 1e-6 without a dot as text.
            return float(value)
    expected = describe_type(hint)
    shown = _HIDDEN if where.endswith("api_key") else repr(value)
    problems.append(f"{where}={shown} must be {expected or 'left out: no file can give it'}")
    return None


def describe_type(hint: Any) -> str:
    """What a file gives for a type, in words; empty for one that no file can give."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return " or ".join(_describe(option) for option in options if _is_plain(option))


def _is_a(option: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(option) or option, typing.get_args(option)
    if _is_union(option):
        return any(_is_a(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments and type(value) in map(type, arguments)
    if origin is tuple:
        return (
            isinstance(value, list)
            and len(value) == len(arguments)
            and all(map(_is_a, arguments, value))
        )
    if origin is list:
        return isinstance(value, list) and all(
            _is_a(arguments[0], item) if arguments else _is_plain(type(item)) for item in value
        )
    if origin is dict:
        return isinstance(value, dict)
    return type(value) is origin


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_number(value: Any) -> bool:
    if type(value) is bool or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_plain(option: Any) -> bool:
    """Whether YAML has such values."""
    plain = (type(None), str, int, float, bool, list, dict, tuple, Literal)
    return (typing.get_origin(option) or option) in plain


def _describe(option: Any) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of {' and '.join(map(describe_type, arguments))}"
    if origin is list:
        return f"a list of {describe_type(arguments[0])}"
    names: dict[Any, str] = {type(None): "null", dict: "a mapping", list: "a list"}
    names |= {str: "text", int: "an integer"}
    names |= {float: "a number", bool: "true or false"}
    return names.get(origin or option, str(option))
