"""One optimizer step of the benchmarks' model under Megatron's own schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_pg.mcore import PrefixGroupedGPTModel
from tools.bench.gpt import Dims, build_model, make_config
from tools.bench.timing import check_equal


class Batch(Protocol):
    """One microbatch: how the model is called on it, and the loss of what it returns."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def num_predictions(self) -> int: ...

    def forward(self, model: Any) -> Any: ...

    def loss(self, output: Tensor) -> Tensor: ...


class Trainer:
    """A model with its optimizer. Every step starts from cleared gradients."""

    def __init__(
        self,
        dims: Dims,
        dtype: torch.dtype,
        model_class: type[PrefixGroupedGPTModel] = PrefixGroupedGPTModel,
    ) -> None:
        self.is_single_precision = dtype == torch.float32
        config = make_config(dims, dtype)
        config.finalize_model_grads_func = finalize_model_grads
        self.hidden_size = dims.hidden_size
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=dtype != torch.float32),
            build_model(dims, config, model_class=model_class),
        )
        # A rate of zero: the optimizer does all of its work and every step stays comparable.
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,
                weight_decay=0.0,
                clip_grad=1.0,
                params_dtype=dtype,
                bf16=dtype == torch.bfloat16,
            ),
            [self.model],
        )
        config.grad_scale_func = self.optimizer.scale_loss

    def forward_backward(self, batches: Sequence[Batch]) -> float | None:
        """Summed loss on the last stage, gradients in ``main_grad``."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=False,
        )
        return float(sum(float(r["loss"]) for r in results)) if results else None

    def step(self, batches: Sequence[Batch]) -> None:
        """Forward, backward, clipping and Adam."""
        self.forward_backward(batches)
        success, _, _ = self.optimizer.step()
        if not success:
            raise RuntimeError("the optimizer skipped the step: a gradient is not finite")

    def check_equal(
        self, paths: Mapping[str, Callable[[], float | None]], baseline: str, ours: str = "ours"
    ) -> float:
        """Run both paths once; the largest difference between their gradients (``check_equal``).

        Args:
            paths: each returns its loss, None on ranks that have none, and leaves gradients.
            baseline: name of the one path.
            ours: name of the other.

        Raises:
            BenchmarkMismatch: if losses or the gradients of a parameter differ.
        """
        losses, gradients = {}, {}
        for name in (ours, baseline):
            losses[name] = paths[name]()
            named = self.model.module.named_parameters()
            gradients[name] = {n: p.main_grad.detach().clone() for n, p in named}
        loss, want = losses[ours], losses[baseline]
        if loss is not None and want is not None:
            pair = ("loss", torch.tensor(loss), torch.tensor(want))
            check_equal([pair], 1e-5 if self.is_single_precision else 2e-2)
        pairs = [(n, g, gradients[baseline][n]) for n, g in gradients[ours].items()]
        return check_equal(pairs, 1e-3 if self.is_single_precision else 1e-1)


def _forward_step(batches: Iterator[Batch], model: Any) -> Any:
    work = next(batches)

    def loss_func(output: Any) -> Any:
        loss = work.loss(output[0])
        # Megatron adds up the counts of context-parallel ranks, which all see the whole row.
        counted = 0 if parallel_state.get_context_parallel_rank() else work.num_predictions
        count = torch.tensor(counted, dtype=torch.int, device=loss.device)
        return loss, count, {"loss": loss.detach().clone()}

    return work.forward(model), loss_func
