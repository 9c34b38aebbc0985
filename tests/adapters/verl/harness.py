"""One batch through verl's own engine on the stock model, and through ours on the wrapped one.

Both are built around a model as verl's ``initialize`` leaves them; verl's ``__init__`` needs
Megatron Bridge, for which ``test_start.py`` has a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from verl.models.mcore.model_forward_fused import patch_fused_forward
from verl.utils import tensordict_utils as tu
from verl.utils.megatron import router_replay_utils
from verl.utils.megatron.router_replay_patch import apply_router_replay_patch
from verl.workers.engine.megatron import MegatronEngineWithLMHead
from verl.workers.utils.losses import ppo_loss, sft_loss

from megatron_pg.adapters.verl import PrefixGroupedMegatronEngine
from megatron_pg.mcore import PrefixSharingGPTModel, count_shared_tokens
from tests.adapters.verl.batches import BATCHES, jagged, make_batch, padded
from tests.data.routed import random_routes
from tests.mcore import cases, harness
from tests.mcore.harness import MAX_LEN, Case, make_config, on_cpu, wrap_ddp


@dataclass(frozen=True, kw_only=True)
class VerlCase:
    """A parallel layout, a batch and what verl is told; ``config`` is told to ours alone."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    cp: int = 1
    batch: str = "ragged"
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    prefix_group: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    # As ``cases.latent`` and the like give them.
    layers: dict[str, Any] = field(default_factory=dict)
    temperature: tuple[float, ...] | None = None
    # Trained by a loss of whole sequences, with the last ten tokens before the response.
    sft: bool = False
    # Prompts, responses and what stands beside them are padded.
    padded: bool = False
    # verl's own engine and rows, into the transparent model; with its fused logprobs.
    transparent: bool = False
    fused: bool = False
    # Layers with experts (1) and without, of a model that has some; replayed as verl names it.
    experts: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    replay: str = "disabled"

    @property
    def layout(self) -> Case:
        return Case(
            tp=self.tp,
            sp=self.sp,
            pp=self.pp,
            vpp=self.vpp,
            dp=self.dp,
            cp=self.cp,
            num_layers=len(self.experts) or self.pp * (self.vpp or 1) * (1 if self.pp > 1 else 2),
            dtype=self.dtype,
            # verl's regime: losses are divided by micro-batches and averaged over replicas.
            config=self.layers.get("config", {})
            | dict(calculate_per_token_loss=False)
            | (EXPERTS | dict(moe_layer_freq=list(self.experts)) if self.experts else {}),
            spec=self.layers.get("spec", {}),
            model=self.model,
        )

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def stock(self) -> VerlCase:
        """As the stock engine runs it: replicas in the place of context-parallel ranks."""
        return replace(self, cp=1, dp=self.dp * self.cp)


EXPERTS = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=16,
    moe_router_load_balancing_type="none",
)


# A state before gated attention, and experts beside a gated shared one. In fp32 gradients of decays
# are 3e-5 apart.
_GATED = cases.gated()
QWEN3_NEXT = VerlCase(
    batch="turns",
    experts=(1, 1),
    layers=_GATED
    | dict(
        config=cases.LINEAR["config"]
        | _GATED["config"]
        | dict(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True)
    ),
    model=_GATED["model"],
    dtype=torch.float64,
)


class Causal(GPTModel):
    """The stock model on padded rows; a causal mask is made where none is given."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **k: Any
    ) -> Any:
        return super().forward(input_ids, position_ids, None, **k)


class Settings(dict[str, Any]):
    """As verl's dataclasses are read."""

    __getattr__ = dict.__getitem__

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def loss_function(**changes: Any) -> Any:
    """verl's own PPO loss."""
    settings = dict(
        loss_agg_mode="token-mean",
        policy_loss=Settings(loss_mode="vanilla"),
        global_batch_info={},
        loss_scale_factor=None,
        use_kl_loss=True,
        kl_loss_type="low_var_kl",
        kl_loss_coef=0.1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=3.0,
        entropy_coeff=0.01,
    )
    return partial(ppo_loss, Settings(settings | changes))


def engine_config(**changes: Any) -> SimpleNamespace:
    settings = dict(
        context_parallel_size=1,
        dynamic_context_parallel=False,
        use_remove_padding=True,
        pad_bshd_to_minibatch_max=False,
        use_fused_kernels=False,
        pad_to_length=False,
        pad_to_length_bucket=512,
        entropy_from_logits_with_chunking=False,
        router_replay=SimpleNamespace(mode="disabled"),
        override_mcore_model_config={},
        forward_only=False,
    )
    return SimpleNamespace(**settings | changes)


def make_engine(cls: type, case: VerlCase, packed: bool) -> Any:
    """An engine around a model with the weights of a seed, its gradients in buffers."""
    layout = case.layout
    config = make_config(layout)
    for name, value in case.config.items() if packed else ():
        setattr(config, name, value)
    if case.replay != "disabled" and not packed:
        # Named where it is imported; a rank has no other.
        router_replay_utils.device_name = "cpu"
        apply_router_replay_patch()
        config.moe_enable_routing_replay = config.enable_routing_replay = True
    torch.manual_seed(1234)
    harness.GPTModel = Causal
    chunks = harness.build(layout, config, packed)
    for chunk in chunks if packed and case.transparent else ():
        chunk.__class__, chunk.min_shared = PrefixSharingGPTModel, 4
        if case.fused:
            patch_fused_forward(chunk)
    chunks = wrap_ddp(layout, config, chunks)
    engine = object.__new__(cls)
    engine.engine_config = engine_config(
        context_parallel_size=case.cp,
        use_remove_padding=packed,
        use_fused_kernels=packed and case.fused,
        override_mcore_model_config={"prefix_group": case.prefix_group},
        router_replay=SimpleNamespace(mode=case.replay),
    )
    engine.model_config = SimpleNamespace(
        mtp=SimpleNamespace(enable=False, enable_train=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        model_type="language_model",
        lora={},
    )
    engine.tf_config, engine.module = config, chunks
    engine.enable_routing_replay = case.replay != "disabled" and not packed
    engine.mini_layer_topk_idx_list = []
    return engine


def engines(case: VerlCase) -> Iterator[tuple[str, Any]]:
    """Ours and then stock, with equal weights; ours must have run where a row is divided."""
    states: list[Any] = []
    mine = MegatronEngineWithLMHead if case.transparent else PrefixGroupedMegatronEngine
    for name, cls in (("ours", mine), ("stock", MegatronEngineWithLMHead)):
        own = case if name == "ours" else case.stock
        harness.initialize(own.layout)
        engine = make_engine(cls, own, packed=name == "ours")
        states = states or [deepcopy(chunk.state_dict()) for chunk in engine.module]
        for chunk, state in zip(engine.module, states, strict=True):
            chunk.load_state_dict(state)
        yield name, engine


def make_data(case: VerlCase, **changes: Any) -> Any:
    """Of this replica."""
    copies = case.cp // parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank() // copies
    rows = BATCHES[case.batch](rank)
    data = dict(case.data)
    if case.temperature is not None:
        data["temperature"] = torch.tensor(case.temperature)[: len(rows)]
    batch = make_batch(rows, len(rows) * case.dp * copies, seed=rank, **data | changes)
    if case.sft:
        masks = [torch.cat([torch.zeros(len(r.prompt)), r.response_mask]) for r in rows]
        for mask, row in zip(masks, rows):
            mask[max(len(row.prompt) - 10, 1) : len(row.prompt)] = 1
        batch["loss_mask"] = jagged([mask.long() for mask in masks])
    if case.replay == "R3":
        batch["routed_experts"] = rollout_routes(rows, case, seed=rank)
    if case.replay != "disabled":
        tu.assign_non_tensor(batch, enable_routing_replay=True)
    return padded(batch) if case.padded else batch


def rollout_routes(rows: Any, case: VerlCase, seed: int) -> Tensor:
    """Of all layers and of all tokens but the last, which is zeros; some samples leave the others.

    A sample without response is one that fills up a batch: zeros throughout.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = len(case.experts), EXPERTS["moe_router_topk"]
    common = random_routes(MAX_LEN, shape, generator)
    found = []
    for number, row in enumerate(rows):
        length = len(row.prompt) + len(row.response)
        routes = common[:length].clone()
        if number % 3 == 1:
            routes[length // 3 :] = random_routes(length - length // 3, shape, generator)
        routes[length - 1 :] = 0
        found.append(routes)
    return jagged(found)


def gradients(engine: Any) -> dict[str, Tensor]:
    return harness.named_gradients(engine.module)


def all_values(output: Any, data: Any, name: str) -> list[Tensor]:
    """Values of every token that another one predicts."""
    return [row[:-1] for row in output["model_output"][name].unbind()]


def response_values(output: Any, data: Any, name: str) -> list[Tensor]:
    """Values of the tokens of every response, as verl's losses slice them."""
    rows = output["model_output"][name].unbind()
    counts = [int((own != 0).sum()) for own in data["responses"].unbind()]
    return [row[len(row) - n - 1 : -1] for row, n in zip(rows, counts)]


@dataclass(frozen=True)
class Difference:
    """How far ours is from verl's own on one rank.

    Attributes:
        losses: summed over micro-batches, stock and ours; None before the last stage.
        gradients: relative norm of the difference of every parameter's gradient.
        smallest: smallest norm of a compared gradient.
        values: largest difference of logprobs and of entropies in the caller's order, relative
            where they are above 1.
        metrics: of ours.
    """

    losses: tuple[float, float] | None
    gradients: dict[str, float]
    smallest: float
    values: dict[str, float]
    metrics: dict[str, float]


def compare(case: VerlCase, forward_only: bool = False) -> Difference:
    """One call of both engines; runs on a rank."""
    with on_cpu(case.layout):
        outputs, found, shared = {}, {}, {}
        for name, engine in engines(case):
            for chunk in engine.module:
                chunk.zero_grad_buffer()
            changes = {} if name == "ours" else STOCK
            data = make_data(case, **changes)
            loss = partial(sft_loss, None) if case.sft else loss_function(**case.loss)
            loss = None if forward_only else loss
            with torch.set_grad_enabled(not forward_only):
                outputs[name] = engine.forward_backward_batch(data, loss, forward_only)
            found[name] = gradients(engine)
            if name == "ours" and case.transparent:
                shared = count_shared_tokens(engine.module[0])._asdict()
        stock, ours = outputs["stock"], outputs["ours"]
        last, values = bool(stock), all_values if case.sft else response_values
        assert bool(ours) == last
        return Difference(
            losses=(sum(stock["loss"]), sum(ours["loss"])) if last and not forward_only else None,
            gradients={
                name: float((found["ours"][name] - g).norm() / g.norm().clamp(min=1e-30))
                for name, g in found["stock"].items()
            },
            smallest=min(float(g.norm()) for g in found["stock"].values()),
            values={
                name: max(
                    float(((a - b).abs() / a.abs().clamp(min=1)).max())
                    for a, b in zip(values(stock, data, name), values(ours, data, name))
                )
                for name in (("log_probs", "entropy") if last else ())
            },
            metrics={
                name.removeprefix("prefix_grouped/"): value[0]
                for name, value in (ours["metrics"].items() if last else ())
                if name.startswith("prefix_grouped/")
            }
            | shared,
        )


# Rows of one sample: verl's own packing is not what is compared.
STOCK = dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=1)
assert MAX_LEN >= 64
