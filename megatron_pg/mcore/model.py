"""Models whose last stage projects only what the loss reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from ..loss import PredictorPlan, gather_predictors, plan_predictors, vocab_parallel_logprobs
from ..tree import to_device
from .decoder import fit_decoder
from .layers import (
    PrefixGroupedLinearAttention,
    PrefixGroupedMamba,
    PrefixGroupedSelfAttention,
    output_weight,
)
from .params import PrefixGroupedSeqParams, check_row_length
from .positioned import PositionedSeqParams


class PrefixGroupedModel(torch.nn.Module):
    """Mixin over a model of Megatron-Core: it runs packed rows, and predicts what they ask for."""

    config: Any
    pg_collection: Any
    decoder: Any
    output_layer: Any
    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    shared_embedding_or_output_weight: Any
    compute_language_model_loss: Any
    set_input_tensor: Any
    position_embedding_type: str
    vocab_size: int
    # Of a ``HybridModel``; layers of others are all alike.
    hybrid_layer_pattern: str | None = None

    def forward(self, input_ids: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock model; ``(logprobs [E], entropy [E] or None)`` with predictions.

        Under context parallelism every rank is fed the whole packed row, runs its part of it and
        returns the predictions of all parts; the gradient that it makes is that of its own part, so
        the ranks' gradients add up to the loss's.

        Raises:
            NotImplementedError: if a packed row meets a layer that is not wrapped, by its number;
                if logits are asked of a row that context-parallel ranks divide.
            ValueError: if those ranks cannot divide the row, or are fed another one than it.
        """
        params = kwargs.get("packed_seq_params")
        if not isinstance(params, PositionedSeqParams):
            return self._run(input_ids, position_ids, *args, **kwargs)
        if isinstance(params, PrefixGroupedSeqParams) and params.is_divided:
            check_row_length(params.layout.total_tokens, self.config)
            if self.pg_collection.cp.size() > 1:
                params = params.on_context_ranks(self.pg_collection.cp)
                kwargs["packed_seq_params"] = params
                input_ids, position_ids = params.cut(input_ids), params.cut(position_ids)
        cores = self._wrapped_cores()
        num_ordinary = [core.num_ordinary_calls for core in cores]
        output = self._run(input_ids, position_ids, *args, **kwargs)
        if num_ordinary != [core.num_ordinary_calls for core in cores]:
            raise NotImplementedError(
                "a layer did not hand packed_seq_params on to its self-attention, which then ran "
                "across samples; hand it on, as TransformerLayer.forward does"
            )
        return output

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The stock model, on this rank's part of the row."""
        return super().forward(*args, **kwargs)

    def _wrapped_cores(self) -> list[Any]:
        """What mixes tokens in every layer, and counts its calls; a layer may have none."""
        cores: list[Any] = []
        for layer in self.decoder.layers:
            attention: Any = getattr(layer, "mixer", getattr(layer, "self_attention", layer))
            if isinstance(attention, IdentityOp):
                continue
            if isinstance(attention, PrefixGroupedLinearAttention | PrefixGroupedMamba):
                cores.append(attention)
                continue
            if not isinstance(attention, PrefixGroupedSelfAttention):
                raise NotImplementedError(
                    f"layer {layer.layer_number} runs {type(attention).__name__}, which does not "
                    "know packed groups; build the model from a spec of which "
                    "with_prefix_grouped_attention wrapped every layer, and leave its layers"
                )
            cores.append(attention.wrapped_core())
        return cores

    def is_asked(self, packed_seq_params: Any) -> bool:
        """Whether ``answer`` takes the place of the stock model's logits on this stage.

        Raises:
            NotImplementedError: if logits are asked of a row that context-parallel ranks divide.
        """
        if not self.post_process:
            return False
        has_predictions = getattr(packed_seq_params, "predictions", None) is not None
        if getattr(packed_seq_params, "context", None) is not None and not has_predictions:
            raise NotImplementedError(
                "logits of a row under context parallelism, of which every rank has a part; give "
                "the row predictions"
            )
        return has_predictions or getattr(packed_seq_params, "output_rows", None) is not None

    def answer(self, hidden_states: Tensor, packed_seq_params: Any) -> Any:
        """Logprobs of the row's predictions, or logits of its ``output_rows``.

        Args:
            hidden_states: ``[T, 1, H]`` after the final norm, this rank's part.
            packed_seq_params: of the row.
        """
        predictions: Any = getattr(packed_seq_params, "predictions", None)
        output_rows: Any = getattr(packed_seq_params, "output_rows", None)
        context = packed_seq_params.context
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        tp_group = self.pg_collection.tp
        ranks: Any = {
            "tp_group": tp_group,
            "sequence_parallel": self.config.sequence_parallel,
            "cp_group": None if context is None else context.group,
        }
        plan = None if predictions is None else predictions.plan
        if plan is None:
            ids = output_rows if predictions is None else predictions.predictor_ids
            plan = _plan(ids, len(hidden_states), **ranks)
            if predictions is not None:
                predictions = predictions.on_rank(plan)
            plan = _on_device(plan, hidden_states.device)
        rows = gather_predictors(hidden_states, plan, **ranks)
        if predictions is None:
            logits = torch.nn.functional.linear(rows, weight)
            return gather_from_tensor_model_parallel_region(logits, group=tp_group)
        is_tied = self.share_embeddings_and_output_weights and self.pre_process
        weight, weight_grad = output_weight(weight, self.config, is_tied=is_tied)
        values = vocab_parallel_logprobs(
            rows,
            weight,
            predictions.target_tokens,
            tp_group=tp_group,
            temperature=predictions.temperature,
            vocab_size=predictions.vocab_size,
            chunk_tokens=predictions.chunk_tokens,
            with_entropy=predictions.with_entropy,
            device_targets=predictions.device_targets,
            weight_grad=weight_grad,
        )
        if context is None:
            return values
        share, total = plan.share, plan.num_predictions
        return tuple(None if x is None else context.join(x, share, total) for x in values)


class PrefixGroupedGPTModel(PrefixGroupedModel, GPTModel):
    """``GPTModel`` that returns logprobs of ``packed_seq_params.predictions`` on the last stage.

    Equals the logprobs of the stock model's logits at ``predictor_ids`` for ``target_tokens``, but
    hidden states are gathered before the vocabulary projection: its cost follows the predicted
    tokens, and logits exist for ``chunk_tokens`` of them at a time. ``generate`` asks it for the
    whole logits ``[rows, padded vocabulary]`` of a few ``output_rows`` instead. Without either it
    is the stock model. State-dict keys are the stock ones.

    Raises:
        NotImplementedError: on the configuration of a hybrid model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.is_hybrid_model:
            raise NotImplementedError(
                "is_hybrid_model=True: GPTModel builds no hybrid; build PrefixGroupedHybridModel "
                "(megatron-core 0.18 or newer), or set is_hybrid_model=False"
            )
        fit_decoder(self)

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        if self.is_asked(packed_seq_params):
            return self.answer(hidden_states, packed_seq_params)
        return super()._postprocess(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )


def _plan(
    ids: Tensor,
    num_tokens: int,
    *,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    cp_group: dist.ProcessGroup | None,
) -> PredictorPlan:
    """``plan_predictors`` of a row that nobody has staged."""
    return plan_predictors(
        ids,
        num_tokens,
        tp_rank=tp_group.rank(),
        tp_size=tp_group.size(),
        sequence_parallel=sequence_parallel,
        cp_rank=0 if cp_group is None else cp_group.rank(),
        cp_size=1 if cp_group is None else cp_group.size(),
    )


def _on_device(plan: PredictorPlan, device: torch.device) -> PredictorPlan:
    """The plan after one copy."""
    moved = to_device(list(plan.arrays.values()), device)
    arrays: dict[str, Any] = dict(zip(plan.arrays, moved))
    return replace(plan, **arrays)
