"""The steps that are run on the fake device, one line each."""

from __future__ import annotations

from typing import Any

from tests.fake_h100.steps import EXPERTS, LATENT, LINEAR, NEMOTRON, Case

_TP: dict[str, Any] = dict(tensor_model_parallel_size=2, sequence_parallel=True)
_CP: dict[str, Any] = dict(context_parallel_size=2)
_DEEPER: dict[str, Any] = dict(num_layers=3)
_PP: dict[str, Any] = dict(pipeline_model_parallel_size=2)
# Twelve responses take two rows of 193 tokens; of the prompt, all but the last token stays.
_DIVIDED = (12,)


def _stays(mode: str) -> dict[str, Any]:
    return dict(prefix_resident="always", prefix_resident_mode=mode)


CASES: dict[str, Case] = {
    "tp1": Case(),
    "deeper": Case(model=dict(num_layers=4)),
    "tp2_sp_rank0": Case(parallel=_TP),
    "tp2_sp_rank1": Case(parallel=_TP, rank=1),
    "cp2_rank0": Case(parallel=_CP),
    "cp2_rank1": Case(parallel=_CP, rank=1),
    "cp2_deeper": Case(parallel=_CP, model=_DEEPER),
    "pp2_first": Case(parallel=_PP),
    "pp2_last": Case(parallel=_PP, rank=1),
    "pp2_vpp2_last": Case(
        model=dict(num_layers=4),
        parallel=_PP | dict(virtual_pipeline_model_parallel_size=2),
        rank=1,
    ),
    "retain": Case(settings=_stays("retain"), group_sizes=_DIVIDED),
    "recompute": Case(settings=_stays("recompute"), group_sizes=_DIVIDED),
    "retain_pp2_first": Case(settings=_stays("retain"), parallel=_PP, group_sizes=_DIVIDED),
    "recompute_pp2_last": Case(
        settings=_stays("recompute"), parallel=_PP, rank=1, group_sizes=_DIVIDED
    ),
    "window_retain": Case(
        model=dict(window_size=[16, 0], window_attn_skip_freq=[1, 0]),
        settings=_stays("retain"),
        group_sizes=_DIVIDED,
    ),
    "experts": Case(model=EXPERTS),
    "experts_deeper": Case(model=EXPERTS | _DEEPER),
    "experts_ep2": Case(model=EXPERTS, parallel=dict(expert_model_parallel_size=2)),
    "latent": Case(model=LATENT),
    "latent_deeper": Case(model=LATENT | _DEEPER),
    "linear": Case(package="fla", model=LINEAR),
    # One more of each kind.
    "linear_deeper": Case(package="fla", model=LINEAR | dict(num_layers=4)),
    "linear_cp2_rank1": Case(package="fla", model=LINEAR, parallel=_CP, rank=1),
    "linear_retain": Case(
        package="fla", model=LINEAR, settings=_stays("retain"), group_sizes=_DIVIDED
    ),
    "mamba": Case(package="mamba_ssm", hf=NEMOTRON),
    "mamba_deeper": Case(
        package="mamba_ssm",
        hf=NEMOTRON | dict(layers_block_type=[*NEMOTRON["layers_block_type"], "mamba"]),
    ),
    "mamba_retain": Case(
        package="mamba_ssm", hf=NEMOTRON, settings=_stays("retain"), group_sizes=_DIVIDED
    ),
    "flash3": Case(package="flash3"),
    "flash_attn": Case(package="flash_attn", settings=dict(attention_backend="flash_attn")),
    "reference": Case(settings=dict(attention_backend="reference")),
    "overlapped": Case(parallel=dict(use_distributed_optimizer=True, overlap_grad_reduce=True)),
    "layer_recompute": Case(
        model=dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    ),
}
