"""A GPT model whose last stage projects only what the loss reads."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from ..loss import gather_predictors, vocab_parallel_logprobs
from .decoder import fit_decoder
from .layers import PrefixGroupedCoreAttention, PrefixGroupedSelfAttention
from .params import PositionedSeqParams, PrefixGroupedSeqParams, check_row_length


class PrefixGroupedGPTModel(GPTModel):
    """``GPTModel`` that returns logprobs of ``packed_seq_params.predictions`` on the last stage.

    Equals the logprobs of the stock model's logits at ``predictor_ids`` for ``target_tokens``, but
    hidden states are gathered before the vocabulary projection: its cost follows the predicted
    tokens, and logits exist for ``chunk_tokens`` of them at a time. ``generate`` asks it for the
    whole logits ``[rows, padded vocabulary]`` of a few ``output_rows`` instead. Without either it
    is the stock model. State-dict keys are the stock ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fit_decoder(self)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ``GPTModel.forward``; ``(logprobs [E], entropy [E] or None)`` with predictions.

        Raises:
            NotImplementedError: if a packed row meets a layer that is not wrapped, by its number.
        """
        params = kwargs.get("packed_seq_params")
        if not isinstance(params, PositionedSeqParams):
            return super().forward(input_ids, *args, **kwargs)
        if isinstance(params, PrefixGroupedSeqParams):
            check_row_length(params.layout.total_tokens, self.config)
        cores = self._wrapped_cores()
        num_ordinary = [core.num_ordinary_calls for core in cores]
        output = super().forward(input_ids, *args, **kwargs)
        if num_ordinary != [core.num_ordinary_calls for core in cores]:
            raise NotImplementedError(
                "a layer did not hand packed_seq_params on to its self-attention, which then ran "
                "across samples; hand it on, as TransformerLayer.forward does"
            )
        return output

    def _wrapped_cores(self) -> list[PrefixGroupedCoreAttention]:
        """Core attention of every layer; a layer without attention has none."""
        cores = []
        for layer in self.decoder.layers:
            attention: Any = getattr(layer, "self_attention", layer)
            if isinstance(attention, IdentityOp):
                continue
            if not isinstance(attention, PrefixGroupedSelfAttention):
                raise NotImplementedError(
                    f"layer {layer.layer_number} runs {type(attention).__name__}, which does not "
                    "know packed groups; build the model from a spec of which "
                    "with_prefix_grouped_attention wrapped every layer, and leave its layers"
                )
            cores.append(attention.wrapped_core())
        return cores

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        predictions = getattr(packed_seq_params, "predictions", None)
        output_rows: Any = getattr(packed_seq_params, "output_rows", None)
        if not self.post_process or (predictions is None and output_rows is None):
            return super()._postprocess(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        tp_group = self.pg_collection.tp
        rows = gather_predictors(
            hidden_states,
            output_rows if predictions is None else predictions.predictor_ids,
            tp_group=tp_group,
            sequence_parallel=self.config.sequence_parallel,
        )
        if predictions is None:
            logits = torch.nn.functional.linear(rows, weight)
            return gather_from_tensor_model_parallel_region(logits, group=tp_group)
        return vocab_parallel_logprobs(
            rows,
            weight,
            predictions.target_tokens,
            tp_group=tp_group,
            temperature=predictions.temperature,
            vocab_size=predictions.vocab_size,
            chunk_tokens=predictions.chunk_tokens,
            with_entropy=predictions.with_entropy,
        )
