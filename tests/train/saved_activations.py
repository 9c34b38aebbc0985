"""On ranks: what a token leaves for the backward pass in one layer of real modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import Predictions, PrefixGroupedSeqParams, build_gpt_chunks
from megatron_pg.mcore.cpu import mamba_kernels
from megatron_pg.mcore.layers import linear_attention, mamba
from megatron_pg.train import parallel_run
from megatron_pg.train.config import ModelConfig, ParallelConfig
from megatron_pg.train.model.plan import ModelPlan, plan_model

VOCAB = 64
TREES = (PrefixTree.from_group(100, [30] * 4), PrefixTree.from_group(52, [20] * 2))
TOTAL_TOKENS = sum(tree.unique_tokens for tree in TREES)


def make_plan(transformer: Mapping[str, Any], parallel: ParallelConfig) -> ModelPlan:
    return plan_model(ModelConfig(vocab_size=VOCAB, transformer=dict(transformer)), parallel)


def saved_bytes(plan: ModelPlan, trees: Sequence[PrefixTree] = TREES) -> int:
    """Of storages that a forward pass over a packed row leaves beside the weights."""
    (model,) = build_gpt_chunks(plan.config, gpt=plan.gpt)
    layout = pack_trees(trees)
    is_predictor = layout.predictor_ids >= 0
    tokens = torch.arange(layout.total_tokens) % VOCAB
    predictions = Predictions(
        predictor_ids=layout.predictor_ids[is_predictor],
        target_tokens=tokens[layout.target_ids[is_predictor]],
    )
    params = PrefixGroupedSeqParams.from_layout(layout, predictions=predictions)
    # The tensors, too, so that no storage takes the place of another.
    saved: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    # What a device compiles keeps other tensors than the same as written, and they are those meant.
    compiled = torch.compiler.set_stance("default")
    with compiled, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        logprobs, _ = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)
    assert logprobs.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(x.untyped_storage().nbytes() for p, x in saved.items() if p not in weights)


def saved_per_token(
    models: Mapping[str, Mapping[str, Any]], parallel: ParallelConfig
) -> dict[str, float]:
    """Bytes of a token of this rank's part in one layer of each model: what two more leave."""
    with parallel_run(parallel, 0):
        found = {}
        for name, transformer in models.items():
            few, more = (
                saved_bytes(make_plan({**transformer, "num_layers": number}, parallel))
                for number in (2, 4)
            )
            found[name] = (more - few) / 2 / (TOTAL_TOKENS // parallel.context_parallel_size)
        return found


class _Recurrence(torch.autograd.Function):
    """Keeps what it reads, as a kernel does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[2].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class _Kernel(torch.autograd.Function):
    """Keeps what it reads and what it returns, as mamba_ssm's scan does."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, *inputs: Tensor) -> Tensor:
        out = inputs[0].clone()
        ctx.save_for_backward(out, sums, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class _OneRead(_Kernel):
    """Keeps its first arguments alone: a convolution with its activation, a norm with its gate."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].clone()


def _with_kernels(stack: ExitStack) -> None:
    """Mamba-2 layers call what keeps for the backward pass as much as kernels, and is none."""

    def scan(x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, *_: Any, **__: Any) -> Any:
        return _Kernel.apply(dt.cumsum(1).detach(), x, dt, b, c), None

    names = {
        "causal_conv1d_fn": lambda x, weight, bias, activation: _OneRead.apply(x),
        "mamba_chunk_scan_combined": scan,
    }
    for target, name, stand_in in (
        (mamba, "runs_kernels", lambda like: True),
        (mamba, "_names", lambda: names),
        (mamba_kernels.GatedRMSNorm, "forward", lambda self, x, z: _OneRead.apply(x, z)),
    ):
        stack.enter_context(mock.patch.object(target, name, stand_in))


def _read_alone(
    rates: Tensor, skip: Tensor, inputs: Sequence[Tensor], *_: Any
) -> tuple[Tensor, None]:
    x, dt, b, c = inputs
    return _Recurrence.apply(b, c, x, dt), None


def hybrid_per_token(
    models: Mapping[str, ModelConfig], parallel: ParallelConfig, has_kernels: bool
) -> float:
    """As ``linear_per_token`` of layers of a hybrid.

    Args:
        models: "few" and, with two layers of a kind more, "more".
        parallel: of the ranks.
        has_kernels: whether Mamba-2 layers keep what kernels do; else what PyTorch does without
            their rule.
    """
    with ExitStack() as stack:
        stack.enter_context(parallel_run(parallel, 0))
        if has_kernels:
            _with_kernels(stack)
        else:
            stack.enter_context(mock.patch.object(mamba, "_torch_rule", _read_alone))
        sample = [PrefixTree.from_sequences([list(range(TOTAL_TOKENS))])]
        few, more = (
            saved_bytes(plan_model(models[name], parallel), sample) for name in ("few", "more")
        )
        return (more - few) / 2 / (TOTAL_TOKENS // parallel.context_parallel_size)


def linear_per_token(transformer: Mapping[str, Any], parallel: ParallelConfig) -> float:
    """As ``saved_per_token`` of layers with linear attention, without what its rule multiplies.

    Over one sample: samples that share tokens are padded to be scanned without a kernel.
    """
    linear_attention._torch_rule = lambda inputs, *_: (_Recurrence.apply(*inputs), None)
    with parallel_run(parallel, 0):
        sample = [PrefixTree.from_sequences([list(range(TOTAL_TOKENS))])]
        few, more = (
            saved_bytes(
                make_plan(
                    {**transformer, "num_layers": number, "linear_attention_freq": pattern},
                    parallel,
                ),
                sample,
            )
            for number, pattern in ((2, [1, 0]), (4, [1, 1, 1, 0]))
        )
        return (more - few) / 2 / (TOTAL_TOKENS // parallel.context_parallel_size)
