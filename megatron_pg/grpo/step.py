"""One GRPO step over the model chunks of a rank: rows, logprobs, advantages, gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from ..data import CostModel, Group, RouteShape
from ..loss import kl_of_samples
from ..mcore import check_replayable
from .advantages import compute_advantages, shaped_rewards
from .batch import StepBatch, pack_batch
from .offload import Offloaded
from .packing_config import PackingConfig, row_cost_model
from .passes import HeadConfig, compute_logprobs, train_pass
from .placement import Placement, place_groups, written_out
from .replay import RouteRecord, check_carried, replayed_routes
from .replicas import MegatronReplicas, Ranks
from .settings import GrpoConfig, PrefixGroupConfig
from .trainable import check_trainable, checked_chunks, unwrapped

Phase = Callable[[str], AbstractContextManager[None]]


class GrpoStep:
    """GRPO over packed groups, for a training loop of one's own.

    Equals the written-out step: every sample trained over its own tokens alone, one loss over the
    groups of all replicas. Megatron's parallel state is initialized, the chunks' spec is wrapped by
    ``with_prefix_grouped_attention``; every rank takes part in each call.

    Args:
        chunks: ``PrefixGroupedGPTModel`` chunks of the policy on this rank, as Megatron's schedules
            take them.
        vocab_size: entries of the vocabulary without padding.
        algorithm: what is optimised.
        settings: how groups are packed; the backend of attention is that of the chunks' spec.
        reference: chunks of the reference model, where a KL term compares with one.
        offload_reference: keep them in host memory between their passes.
        temperature: of the logprobs; the sampling temperature.
        max_response_tokens: longest response that sampling allows, read by the overlong penalty.
        cost_model: of the model; made from the chunks' configuration when None.

    Raises:
        ValueError: if the chunks are no ``PrefixGroupedGPTModel`` in Megatron's
            ``DistributedDataParallel``, have fewer entries than ``vocab_size``, or if their
            configuration would scale the loss or leave gradients unreduced.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        *,
        vocab_size: int,
        algorithm: GrpoConfig | None = None,
        settings: PrefixGroupConfig | None = None,
        reference: Sequence[Any] | None = None,
        offload_reference: bool = False,
        temperature: float = 1.0,
        max_response_tokens: int | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        self.chunks = checked_chunks("chunks", chunks, vocab_size)
        self.reference = (
            None if reference is None else checked_chunks("reference", reference, vocab_size)
        )
        self.algorithm = algorithm or GrpoConfig()
        if self.algorithm.num_minibatches < 1:
            raise ValueError(f"num_minibatches={self.algorithm.num_minibatches} must be at least 1")
        settings = settings or PrefixGroupConfig()
        config = get_model_config(self.chunks[0])
        check_trainable(self.chunks, config)
        self.route_shape = RouteShape.from_config(config)
        self.replayed_routes = replayed_routes(self.algorithm, self.route_shape)
        if self.algorithm.router_replay != "disabled":
            check_replayable(config)
        pattern = unwrapped(self.chunks[0]).hybrid_layer_pattern
        cost_model = cost_model or row_cost_model(config, vocab_size, hybrid_layer_pattern=pattern)
        self.packing = PackingConfig.from_config(settings, config, cost_model)
        self.head = HeadConfig(
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_tokens=settings.logprob_chunk_tokens,
            with_entropy=self.algorithm.needs_entropy,
            resident_mode=settings.prefix_resident_mode,
        )
        self.max_response_tokens = max_response_tokens
        self.ranks = Ranks.from_megatron()
        self._on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        if offload_reference and self.reference is not None:
            self._on_device = Offloaded(self.reference, self.ranks.device).on_device
        self.replicas = MegatronReplicas(self.ranks)

    def prepare(
        self,
        groups: Mapping[int, Group] | Sequence[Group],
        phase: Phase = lambda name: nullcontext(),
    ) -> StepBatch:
        """Everything that ``backward`` needs: rows, old and reference logprobs, advantages.

        Args:
            groups: what this replica brings to the step; those of its first rank count. By number
                within the step, or in order, after those of the replicas before.
            phase: entered with the name of what is being done, "pack" or "logprobs".

        Raises:
            ValueError: on every rank: if there are no groups, a token is not of the vocabulary, a
                group fits in no row, samples carry different kinds of values, or if a KL term has
                nothing to compare with.
        """
        with phase("pack"):
            batch = self.pack(self.place(groups))
        with phase("logprobs"):
            batch = self._with_logprobs(batch)
        return self._with_advantages(batch)

    def place(
        self,
        groups: Mapping[int, Group] | Sequence[Group],
        algorithm: GrpoConfig | None = None,
        num_groups: int | None = None,
    ) -> Placement:
        """Bring every group to the replica that packs it (see ``place_groups``).

        ``algorithm`` divides them into minibatches, the step's own when None.
        """
        placement = place_groups(
            groups,
            algorithm or self.algorithm,
            self.packing,
            self.replicas,
            num_groups=num_groups,
            vocab_size=self.head.vocab_size,
            routes=self.replayed_routes,
        )
        check_carried(self.algorithm, placement.shape.carried)
        return placement

    def pack(self, placement: Placement) -> StepBatch:
        """Rows and values of placed groups (see ``pack_batch``)."""
        return pack_batch(placement, self.algorithm, self.packing, self.replicas)

    def logprobs(
        self,
        batch: StepBatch,
        chunks: Sequence[Any] | None = None,
        record: RouteRecord | None = None,
    ) -> Tensor:
        """``[N]`` float64 logprobs of the batch's trained tokens, on every rank of the replica.

        Args:
            batch: of ``prepare`` or ``pack``.
            chunks: of the model that predicts; the policy when None.
            record: keeps what the routers decide.
        """
        found: Tensor | None = None
        for part in batch.parts(with_left_out=self.algorithm.use_kl_in_reward):
            values = compute_logprobs(
                chunks or self.chunks, part.waves, self.head, self.ranks, record
            )
            if self.ranks.is_last_stage:
                own = batch.collect(part.rows, values)
                found = own if found is None else found + own
        if self.ranks.is_last_stage and found is None:
            found = torch.zeros(batch.num_tokens, dtype=torch.float64)
        return self.replicas.from_last_stage(found, batch.num_tokens)

    def ref_logprobs(self, batch: StepBatch) -> Tensor:
        """``logprobs`` of the reference model. Raises ValueError if there is none."""
        if self.reference is None:
            raise ValueError("there is no reference model; pass reference=")
        with self._on_device():
            return self.logprobs(batch, self.reference)

    def drop_reference(self) -> None:
        """Give up the reference model: from now on samples carry its logprobs."""
        self.reference, self._on_device = None, nullcontext

    def backward(self, batch: StepBatch, minibatch: int = 0) -> dict[str, float]:
        """Gradients of a minibatch's loss, left in the gradient buffers of all ranks, finalized.

        Returns:
            The loss's metric sums over this replica's rows (see ``loss.metric_means`` and
            ``total_over_replicas``); empty on ranks that do not predict.

        Raises:
            ValueError: if the batch has no such minibatch.
        """
        count = len(batch.minibatches)
        if not 0 <= minibatch < count:
            raise ValueError(
                f"minibatch={minibatch}, but {count} minibatches of this batch have trained "
                "tokens; go through range(len(batch.minibatches))"
            )
        rows = batch.minibatches[minibatch]
        return train_pass(
            self.chunks,
            rows.waves,
            batch.values,
            self.algorithm.policy,
            self.head,
            self.ranks,
            logical_tokens=rows.tokens.logical,
        )

    def self_check(self, groups: Mapping[int, Group] | Sequence[Group], num_groups: int) -> float:
        """Largest |logprob packed - logprob written out| over the first judged groups of a step."""
        placed = self.place(groups, GrpoConfig(), num_groups)
        packed = self.logprobs(self.pack(placed))
        alone = self.logprobs(self.pack(written_out(placed)))
        own = float((packed - alone).abs().max()) if len(packed) else 0.0
        return max(self.replicas.gather(lambda: own))

    def _with_logprobs(self, batch: StepBatch) -> StepBatch:
        """Old and reference logprobs, recomputed where none came along."""
        algorithm, values = self.algorithm, batch.values
        carried = batch.shape.carried or ()
        if algorithm.needs_reference and self.reference is None and "ref_logprobs" not in carried:
            if batch.minibatches:
                raise ValueError(
                    "the KL to a reference needs its logprobs: pass reference=, or give every "
                    "sample ref_logprobs"
                )
            return batch
        record = RouteRecord() if algorithm.router_replay == "R2" else None
        if algorithm.runs_old_pass and "old_logprobs" not in carried:
            values = replace(values, old_logprobs=self.logprobs(batch, record=record))
        if self.reference is not None and "ref_logprobs" not in carried:
            values = replace(values, ref_logprobs=self.ref_logprobs(batch))
        batch = replace(batch, values=values)
        if record is not None and self.route_shape is not None and algorithm.runs_old_pass:
            batch = record.onto(batch, self.route_shape)
        return batch

    def _with_advantages(self, batch: StepBatch) -> StepBatch:
        shape, algorithm = batch.shape, self.algorithm
        rewards = shaped_rewards(shape, algorithm, self.max_response_tokens)
        kl = self._kl_of_samples(batch) if algorithm.use_kl_in_reward else None
        batch = replace(batch, kl_of_samples=kl)
        is_own = "old_logprobs" not in (shape.carried or ())
        if kl is not None and is_own and not algorithm.needs_old_logprobs:
            # The policy is updated once: its ratio is 1 without them.
            batch = replace(batch, values=replace(batch.values, old_logprobs=None))
        if "advantages" in (shape.carried or ()) or not batch.minibatches:
            return batch
        if kl is not None:
            rewards = rewards - kl
        own = compute_advantages(shape, rewards, algorithm)[batch.sample_numbers]
        advantages = torch.repeat_interleave(own, batch.counts)
        return replace(batch, values=replace(batch.values, advantages=advantages))

    def _kl_of_samples(self, batch: StepBatch) -> Tensor:
        """``[N_all]`` ``kl_coef`` times the KL of every sample to the reference, on every rank."""
        values = batch.values
        found = torch.zeros(len(batch.shape.rewards), dtype=torch.float64)
        if values.old_logprobs is None or values.ref_logprobs is None:
            return found
        own = self.algorithm.kl_coef * kl_of_samples(
            values.old_logprobs,
            values.ref_logprobs,
            batch.sample_ids,
            len(batch.counts),
            kind=self.algorithm.kl_penalty,
        )
        for numbers, kl in self.replicas.gather(lambda: (batch.sample_numbers, own)):
            found[numbers] = kl
        return found
