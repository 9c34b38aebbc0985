"""A whole Megatron model on one process, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ..mcore import build_gpt_chunks, cpu, make_transformer_config
from .description import HfModel


@contextmanager
def one_rank() -> Iterator[torch.device]:
    """Process groups of size one, unless there are some, and the device to build models on."""
    with ExitStack() as stack:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            stack.enter_context(cpu.emulate_cuda())
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
            stack.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
        yield device


def build_gpt(model: HfModel, dtype: torch.dtype, device: torch.device) -> GPTModel:
    """The whole ``GPTModel`` with the prefix-grouped local spec, its vocabulary not padded."""
    settings = model.transformer_config() | cpu.transformer_config_defaults()
    settings |= dict(params_dtype=dtype, transformer_impl="local")
    config = make_transformer_config(settings)
    (chunk,) = build_gpt_chunks(config, gpt=model.gpt_model())
    return chunk.to(device).eval()
