"""An actor update in verl: its own loop, losses and optimizer around every path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import log
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.megatron import MegatronEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from megatron_pg.adapters import verl as plugin
from tools.bench.gpt import Dims, build_model, build_stock_model, make_config, make_dims, megatron
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, ragged_star, select, star
from tools.bench.timing import check_equal, time_interleaved
from tools.flops import FORWARD_BACKWARD, FlopWeights, flops, packed_flops

# Its backward passes compute neither scores nor logits anew.
_VERL = FlopWeights(3, 3, 3)


@register("verl")
def verl_update(options: Options) -> Iterator[BenchmarkRow]:
    """Verl's ``train_batch``: forward, backward and optimizer of one group's mini-batch.

    Baselines: the same engine told that every sample is a group of its own ("written out"), which
    has the same kernels; and verl's own engine on Megatron-Core's local spec ("verl"), which pads,
    predicts every token of a prompt and has unfused attention on a CPU. The bound weighs tokens,
    pairs and predictions by FLOPs.
    """
    if options.quick:
        shapes = [star(32, 4, 8), ragged_star(32, 8, 4)]
    else:
        shapes = [star(1024, 128, 8), star(512, 64, 8), ragged_star(1024, 128, 8)]
    dims = make_dims(options)
    with megatron(dims):
        engines = {
            "ours": _engine(plugin.PrefixGroupedMegatronEngine, dims, options, packed=True),
            "verl": _engine(MegatronEngineWithLMHead, dims, options, packed=False),
        }
        engines["verl"].module[0].load_state_dict(engines["ours"].module[0].state_dict())
        for shape in shapes:
            if select(shape, options):
                yield from _compare(shape, dims, options, engines)


def _compare(
    shape: Shape, dims: Dims, options: Options, engines: dict[str, Any]
) -> Iterator[BenchmarkRow]:
    paths = {
        "ours": partial(_update, engines["ours"], _batch(shape, dims, same_group=True)),
        "written out": partial(_update, engines["ours"], _batch(shape, dims, same_group=False)),
        "verl": partial(_update, engines["verl"], _batch(shape, dims, same_group=True)),
    }
    gradients = {}
    for name, run in paths.items():
        run()
        chunk = engines["verl" if name == "verl" else "ours"].module[0].module
        gradients[name] = {n: p.main_grad.detach().clone() for n, p in chunk.named_parameters()}
    times = time_interleaved(paths, options.num_rounds(5), options.clock)
    bounds = {
        "written out": flop_bound(shape, dims.cost_model, FORWARD_BACKWARD),
        "verl": _verl_flops(shape, dims) / _our_flops(shape, dims),
    }
    for baseline, bound in bounds.items():
        pairs = [(n, g, gradients[baseline][n]) for n, g in gradients["ours"].items()]
        yield BenchmarkRow(
            benchmark="verl",
            shape=shape.describe(**dims.describe(), dtype=str(options.dtype)),
            baseline=baseline,
            bound=bound,
            max_error=check_equal(pairs, 1e-3),
            **times.against(baseline),
        )


def _our_flops(shape: Shape, dims: Dims) -> float:
    trained = shape.tree.segment_lens[shape.tree.segment_parents >= 0].sum()
    return packed_flops(shape.tree, float(trained), dims.cost_model, FORWARD_BACKWARD)


def _verl_flops(shape: Shape, dims: Dims) -> float:
    tree = shape.tree
    tokens, pairs = tree.logical_tokens, tree.logical_attention_pairs
    return flops(tokens, pairs, tokens, dims.cost_model, _VERL)


def _update(engine: Any, data: TensorDict) -> None:
    engine.train_batch(data.copy(), partial(ppo_loss, _Settings(_LOSS)))


def _batch(shape: Shape, dims: Dims, *, same_group: bool) -> TensorDict:
    """Random tokens of ``shape`` as verl's worker hands them to its engine."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, dims.vocab_size, (shape.packed.total_tokens,), generator=generator)
    lens = shape.tree.sample_lens.tolist()
    prompt_len = int(shape.tree.segment_lens[0])
    sequences = shape.packed.expand(packed).split(lens)
    counts = [n - prompt_len for n in lens]

    def per_token(shift: float) -> torch.Tensor:
        return _jagged([shift + 0.1 * torch.randn(n, generator=generator) for n in counts])

    masks = [torch.ones(n, dtype=torch.long) for n in counts]
    data = TensorDict(
        {
            "input_ids": _jagged(list(sequences)),
            "prompts": _jagged([s[:prompt_len].clone() for s in sequences]),
            "responses": _jagged([s[prompt_len:].clone() for s in sequences]),
            "response_mask": _jagged(masks),
            "loss_mask": _jagged(masks),
            # Of an untrained model: a ratio that is clipped would leave no gradient.
            "old_log_probs": per_token(-log(dims.vocab_size)),
            "advantages": per_token(0.0),
        },
        batch_size=[len(lens)],
    )
    uids = [0] * len(lens) if same_group else list(range(len(lens)))
    tu.assign_non_tensor_stack(data, "uid", uids)
    budget = sum(lens)
    settings: dict[str, Any] = dict(use_dynamic_bsz=True, max_token_len_per_gpu=budget)
    tu.assign_non_tensor(data, **settings, temperature=1.0, global_batch_size=len(lens))
    return data


def _jagged(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


class _Causal(GPTModel):
    """Stock model on verl's padded rows; a causal mask is made where none is given."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **k: Any
    ) -> Any:
        return super().forward(input_ids, position_ids, None, **k)


class _Settings(dict[str, Any]):
    """As verl's dataclasses are read."""

    __getattr__ = dict.__getitem__

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


_LOSS: dict[str, Any] = dict(
    loss_agg_mode="token-mean",
    policy_loss=_Settings(loss_mode="vanilla"),
    global_batch_info={},
    loss_scale_factor=None,
    use_kl_loss=False,
    clip_ratio=0.2,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    entropy_coeff=0.0,
)


def _engine(cls: type, dims: Dims, options: Options, *, packed: bool) -> Any:
    """An engine around a model, as verl's ``initialize`` leaves it; that needs Megatron Bridge."""
    config = make_config(dims, options.dtype)
    config.calculate_per_token_loss = False
    config.finalize_model_grads_func = finalize_model_grads
    if packed:
        model: Any = build_model(dims, config)
    else:
        model = build_stock_model(dims, config)
        model.__class__ = _Causal
    engine: Any = object.__new__(cls)
    engine.module = [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]
    engine.tf_config = config
    # A rate of zero: the optimizer does all of its work and every update stays comparable.
    engine.optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, params_dtype=options.dtype),
        engine.module,
    )
    engine.enable_routing_replay, engine.mini_layer_topk_idx_list = False, []
    engine.model_config = SimpleNamespace(
        mtp=SimpleNamespace(enable=False, enable_train=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        model_type="language_model",
    )
    engine.engine_config = SimpleNamespace(
        context_parallel_size=1,
        dynamic_context_parallel=False,
        use_remove_padding=packed,
        pad_bshd_to_minibatch_max=False,
        use_fused_kernels=False,
        pad_to_length=False,
        pad_to_length_bucket=512,
        entropy_from_logits_with_chunking=False,
        router_replay=SimpleNamespace(mode="disabled"),
    )
    return engine
