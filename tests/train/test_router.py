"""A run whose routers keep statistics: what it logs, and that it goes on as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch  # noqa: E402

from megatron_pg.train import dry_run, load_config  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import late_imports, tiny  # noqa: E402, F401

MODEL = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    num_moe_experts=4,
    moe_ffn_hidden_size=16,
    moe_layer_freq=[0, 1, 1, 1],
    moe_shared_expert_intermediate_size=8,
    moe_router_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.01,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.01,
    moe_z_loss_coeff=0.001,
    moe_router_dtype="fp32",
    add_bias_linear=False,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func="silu",
)
# With attention that keeps state of its own, in 16 bits.
SIXTEEN_BITS = MODEL | dict(
    params_dtype="bfloat16",
    multi_latent_attention=True,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
    rope_type="rope",
    window_size=[4, 0],
    window_attn_skip_freq=[1, 0, 0, 1],
    softmax_type="learnable",
)


def config_of(folder: Path, out: str, layout: str) -> Any:
    sections = tiny.run_sections(folder)
    transformer, parallel = LAYOUTS[layout]
    sections["model"] = dict(vocab_size=tiny.VOCAB, transformer=transformer)
    sections["parallel"] = sections.get("parallel", {}) | parallel
    sections["run"] |= dict(
        num_steps=4, save_interval=3, out=str(folder / out), export_hf=False, keep_checkpoints=3
    )
    return load_config(tiny.write_config(folder / f"{out}.yaml", sections))


def end_of(config: Any, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Weights and biases at the end of a run, or where it is left."""
    with tiny.opened(config) as trainer:
        if stop_after is None:
            trainer.run()
        else:
            for _ in range(stop_after):
                trainer.train_step()
            trainer._save()
        return {
            f"{i}.{name}": value.clone()
            for i, chunk in enumerate(trainer.model.chunks)
            for name, value in chunk.module.state_dict().items()
            if torch.is_tensor(value)
        }


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": (MODEL, {}),
    "tp2_sp_pp2_ep2_etp1_16_bits": (
        SIXTEEN_BITS,
        dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_has_the_same_weights_and_biases(
    ranks: Pool, tmp_path: Path, layout: str
) -> None:
    num_ranks = 4 if LAYOUTS[layout][1] else 1
    whole = config_of(tmp_path, "whole", layout)
    parts = config_of(tmp_path, "parts", layout)
    assert dry_run(whole, num_ranks).lines
    wanted = ranks.run(num_ranks, end_of, whole, timeout=240)
    halfway = ranks.run(num_ranks, end_of, parts, 3, timeout=240)
    got = ranks.run(num_ranks, end_of, parts, timeout=240)
    biases = 0
    for ours, theirs, before in zip(got, wanted, halfway):
        assert ours.keys() == theirs.keys()
        other = {n: float((ours[n] - x).abs().max()) for n, x in theirs.items()}
        assert not any(other.values()), other
        for name in theirs:
            if name.endswith("expert_bias"):
                biases += 1
                assert before[name].any(), "nothing to be saved"
                assert theirs[name].dtype == torch.float32
        weights = {x.dtype for n, x in theirs.items() if n.endswith("proj.weight")}
        assert weights == {torch.bfloat16 if "16" in layout else torch.float32}
    assert biases == 3 * min(num_ranks, 2)
    steps = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert len(steps) == 4
    for step in steps:
        # Of balanced routers the first is 1; the second is log(4) squared where logits are 0.
        assert 0.9 < step["router/load_balancing_loss"] < 2.5
        assert 1.0 < step["router/z_loss"] < 5.0
        assert "router/seq_load_balancing_loss" not in step
