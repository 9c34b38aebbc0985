"""What a checkpoint says of the run that wrote it, beside weights and optimizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...checkpoint import iteration_name, parse_json
from ...parallel import PipelineSplit
from ..config import TrainConfig, config_dict
from ..rollouts import Evaluation

# Sections and settings that change how a run computes, reports or is kept, not what it computes.
_FREE = (
    *("parallel.", "rollout.files", "rollout.format", "rollout.max_batch_samples"),
    *(f"model.transformer.{field.name}" for field in fields(PipelineSplit)),
    *("rollout.prompts.files", "rollout.prompts.val_files"),
    *("rollout.server.", "model.transformer_impl", "prefix_group.attention_backend"),
    *("prefix_group.max_", "prefix_group.prefix_resident", "prefix_group.logprob_chunk_tokens"),
    *("run.out", "run.num_steps", "run.save_interval"),
    *("run.keep_checkpoints", "run.async_save", "run.load", "run.self_check_"),
    *("run.eval_interval", "run.keep_best", "run.log_generations", "run.tensorboard"),
    *("run.wandb_project", "run.export_hf"),
    *("algorithm.ref_offload", "algorithm.precompute_ref_logprobs"),
)
_TOTALS = ("unique_tokens", "logical_tokens", "seconds", "checkpoint_seconds")
_DISTRIBUTED = "use_distributed_optimizer"
# Checkpoints of earlier versions have none of them.
_OPTIONAL = ("settings", "changes", "best")


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        step: after which it was made, and whose checkpoint is kept.
        value: its mean reward.
    """

    step: int
    value: float


@dataclass(kw_only=True)
class Progress:
    """State of a run between two steps.

    Attributes:
        step: steps done.
        use_distributed_optimizer: whether the optimizer's state is in that optimizer's names.
        stream: position in the rollouts, as ``GroupStream.state_dict``.
        totals: of all steps so far.
        evaluations: on held-out prompts, by when.
        settings: what of the configuration decides the course of training, by dotted name; None in
            a checkpoint that an earlier version wrote.
        changes: settings that resumed runs changed on the way, each with the step they began after.
        best: the best evaluation so far; None as long as none was to be kept.
    """

    step: int
    use_distributed_optimizer: bool
    stream: dict[str, Any]
    totals: dict[str, float]
    evaluations: dict[str, Evaluation]
    settings: dict[str, Any] | None
    changes: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None

    def to_json(self) -> str:
        """As ``parse_progress`` reads it."""
        return json.dumps(asdict(self))


def parse_progress(text: bytes, path: Path) -> Progress:
    """Read and check a ``progress.json``.

    Args:
        text: of the file.
        path: of the file, in a folder ``iter_<step>``.

    Raises:
        ValueError: naming the file and everything in it that is not what a run writes.
    """
    content = parse_json(text, path)
    problems = list(_problems(content, path))
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}{_REMEDY}")
    evaluations = {name: Evaluation(**e) for name, e in content.pop("evaluations").items()}
    content.setdefault("settings", None)
    best = content.pop("best", None)
    best = None if best is None else Best(**best)
    return Progress(**content, evaluations=evaluations, best=best)


def course_settings(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides the course of training, by dotted name, as JSON has it."""
    flat = dict(_flattened(config_dict(config), ""))
    if config.optimizer.lr_decay_style != "constant":
        # The decay ends with the run.
        flat["optimizer.decay_steps"] = config.run.num_steps
    settings: dict[str, Any] = json.loads(
        json.dumps({name: value for name, value in flat.items() if not name.startswith(_FREE)})
    )
    return settings


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """``name -> [before, now]`` of all that differ; what one of them lacks is None there.

    A setting that ``before`` lacks, as one of an earlier version does, had no effect then: it is
    as it was where it is at its default.
    """
    defaults = course_settings(TrainConfig())
    new = now.keys() - before.keys()
    names = sorted((before.keys() | now.keys()) - {n for n in new if now[n] == defaults.get(n)})
    pairs = {name: [before.get(name), now.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


_REMEDY = (
    "; restore the file, or go on from another checkpoint by writing its step into the tracker"
)


def _flattened(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _problems(content: dict[str, Any], path: Path) -> Iterator[str]:
    known = {"step", _DISTRIBUTED, "stream", "totals", "evaluations"}
    yield from (f"{name} is missing" for name in sorted(known - content.keys()))
    for name in sorted(content.keys() - known - set(_OPTIONAL)):
        yield f"{name[:40]!r} is unknown (a newer version may have written it: resume with that)"
    step = content.get("step", 0)
    if type(step) is not int or path.parent.name != iteration_name(step):
        yield f"step={str(step)[:40]} must be the number in {path.parent.name}"
    elif step < 1:
        yield f"step={step} must be at least 1"
    if type(content.get(_DISTRIBUTED, True)) is not bool:
        yield f"{_DISTRIBUTED}={content[_DISTRIBUTED]!r} must be true or false"
    yield from _stream_problems(content.get("stream"), step)
    totals = content.get("totals", dict.fromkeys(_TOTALS, 0))
    if not isinstance(totals, dict) or sorted(totals) != sorted(_TOTALS):
        yield f"totals must be an object of {', '.join(_TOTALS)}"
    elif not all(_is_number(value) and value >= 0 for value in totals.values()):
        yield f"totals={totals} must be numbers from 0"
    yield from _evaluation_problems(content.get("evaluations", {}))
    yield from _best_problems(content.get("best"), step)
    if not isinstance(content.get("settings", {}), dict):
        yield "settings must be an object"
    changes = content.get("changes", [])
    if not isinstance(changes, list) or not all(isinstance(change, dict) for change in changes):
        yield "changes must be a list of objects"


def _stream_problems(stream: Any, step: Any) -> Iterator[str]:
    if not isinstance(stream, dict):
        yield f"stream={str(stream)[:40]} must be an object"
        return
    taken = stream.get("num_taken")
    # Every step takes a group at least.
    if type(taken) is not int or (type(step) is int and taken < max(step, 1)):
        yield f"stream.num_taken={str(taken)[:40]} must be a whole number, of {step} steps at least"


def _evaluation_problems(evaluations: Any) -> Iterator[str]:
    fields = ("mean", "standard_error", "num_prompts")
    if not isinstance(evaluations, dict) or not evaluations.keys() <= {"before", "after"}:
        yield "evaluations must be an object of 'before' and 'after'"
        return
    for name, values in evaluations.items():
        # Earlier versions wrote no metrics.
        is_complete = isinstance(values, dict) and values.keys() - {"metrics"} == set(fields)
        if not is_complete or not all(_is_number(values[field]) for field in fields):
            yield f"evaluations.{name}={str(values)[:80]} must be numbers: {', '.join(fields)}"
        elif not _are_numbers(values.get("metrics", {})):
            yield f"evaluations.{name}.metrics must be an object of numbers"
        elif type(values["num_prompts"]) is not int or values["num_prompts"] < 1:
            yield f"evaluations.{name}.num_prompts={values['num_prompts']} must be at least 1"


def _best_problems(best: Any, step: Any) -> Iterator[str]:
    if best is None:
        return
    is_complete = isinstance(best, dict) and best.keys() == {"step", "value"}
    if not is_complete or type(best["step"]) is not int or not _is_number(best["value"]):
        yield f"best={str(best)[:80]} must be an object of step and value"
    elif type(step) is int and not 1 <= best["step"] <= step:
        yield f"best.step={best['step']} must be a step of the run, from 1 to {step}"


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(_is_number, values.values()))


def _is_number(value: Any) -> bool:
    # NaN is not below; an integer may be too large for a float.
    return type(value) in (int, float) and abs(value) < 1e300
