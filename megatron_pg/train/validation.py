"""Held-out prompts judged before, during and after training, and the best of these."""

from __future__ import annotations

import time

from .checkpoints import Best
from .config import RunConfig
from .metrics import Generations, make_generations
from .rollouts import Evaluation, SharedStream, evaluate


class Validation:
    """The evaluations of a run; driven on every rank alike.

    Args:
        run: says when, and what is judged.
        stream: gives held-out groups.

    Attributes:
        evaluations: by when: "before" and "after" training.
        best: the best one in training; None as long as none is to be kept.
        generations: of the latest one, on the first rank; None where none are logged.
    """

    def __init__(self, run: RunConfig, stream: SharedStream) -> None:
        self.run, self.stream = run, stream
        self.evaluations: dict[str, Evaluation] = {}
        self.best: Best | None = None
        self.generations: Generations | None = None
        self._latest: tuple[int, Evaluation] | None = None

    def before(self, step: int) -> Evaluation | None:
        """Judge before training, unless that is done or ``step`` steps have been trained."""
        if not self.run.eval_prompts or step or "before" in self.evaluations:
            return None
        self.evaluations["before"] = self._judge(step)
        return self.evaluations["before"]

    def at(self, step: int) -> tuple[Evaluation, dict[str, float]] | None:
        """Judge after ``step`` steps, if it is time; the evaluation and its metrics."""
        interval = self.run.eval_interval
        if not interval or (step % interval and step < self.run.num_steps):
            return None
        started = time.perf_counter()
        found = self._judge(step)
        metrics = dict(found.metrics) | {"time/eval": time.perf_counter() - started}
        if self.run.keep_best:
            if self.best is None or found.mean > self.best.value:
                self.best = Best(step, found.mean)
            metrics |= {"eval/best": self.best.value, "eval/best_step": float(self.best.step)}
        return found, metrics

    def is_best(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is to be kept."""
        return self.best is not None and self.best.step == step

    def after(self, step: int) -> Evaluation | None:
        """Judge after training, unless that was the last step's evaluation; None if it was."""
        if not self.run.eval_prompts:
            return None
        if self._latest is not None and self._latest[0] == step:
            self.evaluations["after"] = self._latest[1]
            return None
        self.evaluations["after"] = self._judge(step)
        return self.evaluations["after"]

    def _judge(self, step: int) -> Evaluation:
        found, groups = evaluate(self.run, self.stream)
        self._latest = step, found
        if self.run.log_generations_interval is not None:
            self.generations = make_generations("eval", step, groups, self.run.log_generations)
        return found
