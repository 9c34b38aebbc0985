"""The loop: rollouts, minibatches, updates, metrics, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..attention import describe_backend
from ..checkpoint import export_hf
from ..data import Group
from ..grpo import GrpoStep, StepBatch, total_over_replicas
from ..mcore import (
    attention_backends,
    count_attention_calls,
    has_router_losses,
    take_router_losses,
)
from .checkpoints import Checkpoints, Progress, course_settings, is_distributed, writing
from .config import TrainConfig
from .metrics import (
    Generations,
    PhaseTimer,
    Sink,
    batch_metrics,
    closing_table,
    cost_metrics,
    make_generations,
    peak_memory_bytes,
    plot_reward,
    read_metrics,
    token_metrics,
    update_metrics,
    write_summary,
)
from .model import TrainedModel
from .rollouts import Evaluation, SharedStream, gather_groups, next_step_groups
from .validation import Validation


class Trainer:
    """The loop of a run over its parts; driven on every rank alike (see ``open_run``).

    Args:
        config: of the run.
        stream: where groups come from.
        step: packs them and makes gradients.
        model: whose weights are trained.
        checkpoints: where they are kept.
        sinks: where metrics go; none on ranks but the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        stream: SharedStream,
        step: GrpoStep,
        model: TrainedModel,
        checkpoints: Checkpoints,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.config = config
        self.ranks = step.ranks
        self.folder = Path(config.run.out)
        self.stream, self.grpo, self.model = stream, step, model
        self.checkpoints = checkpoints
        self.sinks = list(sinks)
        self.validation = Validation(config.run, stream)
        self.step = 0
        self.changes: list[dict[str, Any]] = []
        self.totals = {
            "unique_tokens": 0,
            "logical_tokens": 0,
            "seconds": 0.0,
            "checkpoint_seconds": 0.0,
        }

    def resume(self, progress: Progress) -> None:
        """Count on from where a checkpoint was taken, whose weights and stream are loaded."""
        self.step, self.changes = progress.step, progress.changes
        self.totals = progress.totals
        self.validation.evaluations = progress.evaluations
        if progress.best is not None and self.checkpoints.has(progress.best.step):
            self.validation.best = progress.best

    def run(self) -> None:
        """Train to the last step; the first rank writes metrics, plot and summary.

        Raises:
            OSError: naming the file that could not be written, on the rank that writes it or on
                all; the newest checkpoint is as it was.
            FloatingPointError: on an update that is not finite.
        """
        run = self.config.run
        if self.step >= run.num_steps:
            self._say(f"all {run.num_steps} steps are done; raise run.num_steps to train on")
        if self.step:
            # A server still has the weights that it was started with.
            self.stream.update_weights(self._export_policy, self.step)
        source = self.stream.start()
        if source is not None:
            self._say(str(source))
        before = self.validation.before(self.step)
        if before is not None:
            self._tell_evaluation("before training", before)
            if run.eval_interval:
                self._write({"step": 0.0, **before.metrics})
        while self.step < run.num_steps:
            metrics = self.train_step()
            judged = self.validation.at(self.step)
            # Before the checkpoint: a resumed run has the metrics of every step before it.
            self._write(metrics if judged is None else metrics | judged[1])
            if judged is not None:
                self._tell_evaluation(f"after step {self.step}", judged[0])
            is_last = self.step == run.num_steps
            is_due = run.save_interval and (self.step % run.save_interval == 0 or is_last)
            if is_due or self.validation.is_best(self.step):
                self._save()
            self.checkpoints.poll()
        self.checkpoints.wait()
        after = self.validation.after(self.step)
        if after is not None:
            self._tell_evaluation("after training", after)
        if run.export_hf:
            self._export_result()
        if self.ranks.rank == 0:
            self._finish()
        for sink in self.sinks:
            sink.close()
        dist.barrier()

    def train_step(self) -> dict[str, float]:
        """One rollout and its updates.

        Returns:
            The step's metrics (see ``METRICS``), complete on the first rank.
        """
        timer, started = PhaseTimer(), time.perf_counter()
        metrics = {"step": float(self.step + 1)}
        with timer.phase("rollout"):
            is_last = self.step + 1 == self.config.run.num_steps
            groups, told = next_step_groups(self.config, self.stream, is_last=is_last)
        metrics |= told
        self._show_groups(groups)
        interval = self.config.run.self_check_interval
        if interval is not None and (self.step == 0 or (interval and self.step % interval == 0)):
            with timer.phase("self_check"):
                metrics["check/packed_vs_written_out"] = self.grpo.self_check(
                    groups, self.config.run.self_check_groups
                )
        batch = self.grpo.prepare(groups, timer.phase)
        # Rows have their tokens; a server's groups hold texts too.
        del groups
        metrics |= batch_metrics(batch) | self._update(batch, timer)
        self.step += 1
        with timer.phase("rollout"):
            self.stream.wait()
        with timer.phase("sync"):
            self.stream.update_weights(self._export_policy, self.step)
        tokens = batch.tokens
        metrics |= token_metrics(self.config, batch, self.ranks.dp_size)
        metrics |= cost_metrics(batch.minibatches)
        metrics["perf/peak_memory_bytes"] = peak_memory_bytes(self.ranks.device)
        seconds = time.perf_counter() - started
        metrics |= timer.metrics() | {"time/step": seconds}
        metrics["perf/unique_tokens_per_second"] = tokens.unique / seconds
        metrics["perf/logical_tokens_per_second"] = tokens.logical / seconds
        self.totals["unique_tokens"] += tokens.unique
        self.totals["logical_tokens"] += tokens.logical
        self.totals["seconds"] += seconds
        return metrics

    def _update(self, batch: StepBatch, timer: PhaseTimer) -> dict[str, float]:
        """Inner epochs over the minibatches; metrics of the updates."""
        sums: dict[str, float] = {}
        grad_norms = []
        config = self.model.plan.config
        for _ in range(self.config.algorithm.ppo_epochs):
            for minibatch in range(len(batch.minibatches)):
                with timer.phase("train"):
                    update = self.grpo.backward(batch, minibatch)
                with timer.phase("optimizer"):
                    grad_norms.append(self._optimizer_step())
                for name, value in update.items():
                    sums[name] = sums.get(name, 0.0) + value
        metrics = {"optimizer/lr": float(self.model.optimizer.param_groups[0]["lr"])}
        if has_router_losses(config):
            rows = (batch.tokens.rows - batch.tokens.fillers) * self.config.algorithm.ppo_epochs
            losses = take_router_losses(config, rows, self.ranks.device)
            metrics |= {f"router/{name}": value for name, value in losses.items()}
        total = total_over_replicas(sums, self.ranks)
        return metrics | update_metrics(total, grad_norms) if self.ranks.rank == 0 else metrics

    def _optimizer_step(self) -> float:
        success, grad_norm, _ = self.model.optimizer.step()
        if not success or grad_norm is None or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {self.step + 1}: gradient norm {grad_norm}; the weights are lost since the "
                "last checkpoint. Lower optimizer.lr, or look at this step's rewards and logprobs"
            )
        self.model.scheduler.step(increment=1)
        self.model.optimizer.zero_grad()
        return float(grad_norm)

    def _show_groups(self, groups: Mapping[int, Group]) -> None:
        run, step = self.config.run, self.step + 1
        if run.log_generations_interval and step % run.log_generations_interval == 0:
            gathered = gather_groups(groups)
            self._show(make_generations("train", step, gathered, run.log_generations))

    def _tell_evaluation(self, when: str, result: Evaluation) -> None:
        self._say(
            f"held-out reward {when}: {result.mean:.3f} ± {result.standard_error:.3f} "
            f"({result.num_prompts} prompts)"
        )
        if self.validation.generations is not None:
            self._show(self.validation.generations)

    def _write(self, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(metrics)

    def _show(self, generations: Generations) -> None:
        for sink in self.sinks:
            sink.show(generations)

    def _say(self, what: Any) -> None:
        for sink in self.sinks:
            sink.say(what)

    def _bare_chunks(self) -> list[Any]:
        return [chunk.module for chunk in self.model.chunks]

    def _export_policy(self, folder: Path) -> None:
        assert self.config.model.hf is not None
        with writing(folder):
            export_hf(self._bare_chunks(), folder, self.config.model.hf)

    def _export_result(self) -> None:
        folder = self.folder / f"hf_step_{self.step}"
        # Folders appear when they are complete: a finished run that is started again has its own.
        is_there = torch.tensor(int(folder.is_dir()))
        dist.all_reduce(is_there, op=dist.ReduceOp.MAX)
        if not bool(is_there):
            self._export_policy(folder)

    def _save(self) -> None:
        started = time.perf_counter()
        progress = Progress(
            step=self.step,
            use_distributed_optimizer=is_distributed(self.model),
            stream=self.stream.state_dict(),
            totals=self.totals,
            evaluations=self.validation.evaluations,
            best=self.validation.best,
            settings=course_settings(self.config),
            changes=self.changes,
        )
        self.checkpoints.save(self.model, progress)
        self.totals["checkpoint_seconds"] += time.perf_counter() - started

    def _finish(self) -> None:
        """Plot, summary and the closing table, on the first rank."""
        steps = read_metrics(self.folder / "metrics.jsonl")
        history = [metrics for metrics in steps if metrics["step"]]
        evaluations = self.validation.evaluations
        chunks = torch.nn.ModuleList(self._bare_chunks())
        backends = [
            describe_backend(name, self.ranks.device) for name in attention_backends(chunks)
        ]
        path = self.folder / "summary.json"
        write_summary(
            path,
            history,
            evaluations,
            self.totals,
            self.changes,
            backends,
            self.validation.best,
        )
        if history:
            plot = self.folder / "reward.png"
            with writing(plot):
                plot_reward(history, evaluations, plot)
        calls = count_attention_calls(chunks)
        # A stage may hold layers of linear attention alone, which have no backend.
        named = f" ({', '.join(backends)})" if backends else ""
        kinds = {
            f"prefix-grouped{named}": calls.prefix_grouped,
            "ordinary": calls.ordinary,
        }
        self._say(closing_table(history, self.totals, self.model.plan.layers, kinds))
