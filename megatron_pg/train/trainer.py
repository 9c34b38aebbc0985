"""The loop: rollouts, minibatches, updates, metrics, checkpoints."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint import export_hf
from ..grpo import GrpoStep, Ranks, StepBatch, total_over_replicas
from ..mcore import count_attention_calls
from .checkpoints import (
    Checkpoints,
    Progress,
    course_settings,
    hold_folders,
    is_distributed,
    resume_run,
    writing,
)
from .config import TrainConfig
from .config_checks import config_problems, raise_problems
from .config_file import config_dict
from .evaluate import Evaluation, evaluate
from .metrics import (
    MetricsWriter,
    PhaseTimer,
    batch_metrics,
    closing_table,
    cost_metrics,
    peak_memory_bytes,
    plot_reward,
    token_metrics,
    update_metrics,
    write_summary,
)
from .model import build_reference, build_trained_model, validate_weights
from .model_plan import plan_model, select_attention, validate_trainable
from .sources import Recording, make_stream, open_sampling, share_recording


class Trainer:
    """One run; constructed and driven on every rank alike.

    Args:
        config: of the run.
        ranks: this rank's place.

    Raises:
        ValueError: on whatever would stop the run later, rollouts and a folder in use by another
            run included. Nothing is built then, except where weights turn out to be another model's
            or a checkpoint cannot be loaded.
        NotImplementedError: on a model that is not supported.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        raise_problems("of this run", config_problems(config))
        self.config = config
        self.ranks = ranks
        self.folder = Path(config.run.out)
        self.step = 0
        self.evaluations: dict[str, Evaluation] = {}
        self.changes: list[dict[str, Any]] = []
        self.note: str | None = None
        self.totals = {
            "unique_tokens": 0,
            "logical_tokens": 0,
            "seconds": 0.0,
            "checkpoint_seconds": 0.0,
        }
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep=config.run.keep_checkpoints,
            is_async=config.run.async_save,
        )
        with ExitStack() as held:
            self.warnings = held.enter_context(hold_folders(config))
            newest = self._find_checkpoint()
            self._build()
            if newest is not None:
                self._resume(newest)
            self._held = held.pop_all()

    def run(self) -> None:
        """Train to the last step; the first rank writes metrics, plot and summary.

        Raises:
            OSError: naming the file that could not be written, on the rank that writes it or on
                all; the newest checkpoint is as it was.
            FloatingPointError: on an update that is not finite.
        """
        with self._held:
            self._run()

    def _run(self) -> None:
        run = self.config.run
        writer = None
        if self.ranks.rank == 0:
            writer = MetricsWriter(run, config_dict(self.config), self.step)
            for warning in self.warnings:
                writer.print(warning)
            if self.note is not None:
                writer.note(self.note)
        if self.step:
            # A server still has the weights that it was started with.
            self.stream.update_weights(self._export_policy, self.step)
        source = self.stream.start()
        if writer is not None and source is not None:
            writer.print(str(source))
        if run.eval_prompts and "before" not in self.evaluations:
            self.evaluations["before"] = self._evaluate(writer, "before training")
        while self.step < run.num_steps:
            metrics = self.train_step()
            if writer is not None:
                # Before the checkpoint: a resumed run has the metrics of every step before it.
                writer.write(metrics)
            is_last = self.step == run.num_steps
            if run.save_interval and (self.step % run.save_interval == 0 or is_last):
                self._save()
            self.checkpoints.poll()
        self.checkpoints.wait()
        if run.eval_prompts and "after" not in self.evaluations:
            self.evaluations["after"] = self._evaluate(writer, "after training")
        if run.export_hf:
            self._export_result()
        if writer is not None:
            self._finish(writer)
        dist.barrier()

    def train_step(self) -> dict[str, float]:
        """One rollout and its updates.

        Returns:
            The step's metrics (see ``report.METRICS``), complete on the first rank.
        """
        timer, started = PhaseTimer(), time.perf_counter()
        with timer.phase("rollout"):
            groups = self.stream.next_groups(self.config.run.groups_per_step)
        metrics = {"step": float(self.step + 1)}
        interval = self.config.run.self_check_interval
        if interval is not None and (self.step == 0 or (interval and self.step % interval == 0)):
            with timer.phase("self_check"):
                metrics["check/packed_vs_written_out"] = self.grpo.self_check(
                    groups, self.config.run.self_check_groups
                )
        batch = self.grpo.prepare(groups, timer.phase)
        metrics |= batch_metrics(batch) | self._update(batch, timer)
        self.step += 1
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

    def _build(self) -> None:
        """Everything of the run, after all that can be refused has been looked at."""
        config, ranks = self.config, self.ranks
        plan = plan_model(config.model, config.parallel)
        validate_trainable(plan)
        validate_weights(config)
        self.attention = select_attention(plan, config.prefix_group.attention_backend, ranks.device)
        packing = plan.packing(config.prefix_group)
        inputs = (
            share_recording(config, plan, packing, ranks)
            if config.rollout.source == "recorded"
            else open_sampling(config, plan.max_positions)
        )
        updates = (
            config.run.num_steps * config.algorithm.ppo_epochs * config.algorithm.num_minibatches
        )
        self.model = build_trained_model(config, plan, updates)
        recorded = inputs.fields if isinstance(inputs, Recording) else ()
        needs_reference = config.algorithm.needs_reference and "ref_logprobs" not in recorded
        reference = build_reference(config) if needs_reference else None
        self.grpo = GrpoStep(
            self.model.chunks,
            vocab_size=plan.vocab_size,
            algorithm=config.algorithm,
            settings=config.prefix_group,
            reference=reference,
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
        )
        self.stream = make_stream(config, inputs, self.model.chunks, plan.vocab_size, ranks)

    def _update(self, batch: StepBatch, timer: PhaseTimer) -> dict[str, float]:
        """Inner epochs over the minibatches; metrics of the updates."""
        sums: dict[str, float] = {}
        grad_norms = []
        for _ in range(self.config.algorithm.ppo_epochs):
            for minibatch in range(len(batch.minibatches)):
                with timer.phase("train"):
                    update = self.grpo.backward(batch, minibatch)
                with timer.phase("optimizer"):
                    grad_norms.append(self._optimizer_step())
                for name, value in update.items():
                    sums[name] = sums.get(name, 0.0) + value
        metrics = {"optimizer/lr": float(self.model.optimizer.param_groups[0]["lr"])}
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

    def _evaluate(self, writer: MetricsWriter | None, when: str) -> Evaluation:
        result = evaluate(self.config, self.stream)
        if writer is not None:
            writer.print(
                f"held-out reward {when}: {result.mean:.3f} ± {result.standard_error:.3f} "
                f"({result.num_prompts} prompts)"
            )
        return result

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
            evaluations=self.evaluations,
            settings=course_settings(self.config),
            changes=self.changes,
        )
        self.checkpoints.save(self.model, progress)
        self.totals["checkpoint_seconds"] += time.perf_counter() - started

    def _find_checkpoint(self) -> Path | None:
        newest = self.checkpoints.find()
        if newest is not None and not self.config.run.load:
            raise ValueError(
                f"run.load=false, but {newest.parent} holds checkpoints, which a fresh run would "
                "mix with its own; choose another run.out, or remove that folder"
            )
        return newest

    def _resume(self, path: Path) -> None:
        progress, self.note = resume_run(path, self.config, self.model, self.stream)
        self.step, self.changes = progress.step, progress.changes
        self.totals, self.evaluations = progress.totals, progress.evaluations

    def _finish(self, writer: MetricsWriter) -> None:
        """Plot, summary and the closing table."""
        path, history = self.folder / "summary.json", writer.history
        write_summary(path, history, self.evaluations, self.totals, self.changes)
        if writer.history:
            plot = self.folder / "reward.png"
            with writing(plot):
                plot_reward(writer.history, self.evaluations, plot)
        calls = count_attention_calls(torch.nn.ModuleList(self._bare_chunks()))
        kinds = {
            f"prefix-grouped ({self.attention})": calls.prefix_grouped,
            "ordinary": calls.ordinary,
        }
        layers = self.model.plan.layers
        writer.print(closing_table(writer.history, self.totals, layers, kinds))
        writer.close()
