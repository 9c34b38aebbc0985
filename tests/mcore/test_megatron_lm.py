"""Megatron-LM's seams: what its scripts build, by the calls that each version makes."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp

from megatron_pg.mcore import (
    PrefixSharingGPTModel,
    count_attention_calls,
    count_shared_tokens,
    gpt_builder,
    gpt_config_from_args,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.builder import _stock_spec
from megatron_pg.mcore.layers import PrefixGroupedSelfAttention
from tests.mcore import harness
from tests.mcore.sharing_rows import Variant, build
from tests.mcore.test_spec import Arguments, run
from tests.utils import ROOT

pytestmark = pytest.mark.megatron

# Wheels bring Megatron-LM's training package since core 0.17, with model configs since 0.19.
has_training = importlib.util.find_spec("megatron.training") is not None
has_configs = has_training and hasattr(
    importlib.import_module("megatron.training.argument_utils"), "gpt_config_from_args"
)
needs_training = pytest.mark.skipif(not has_training, reason="no megatron.training is installed")
needs_configs = pytest.mark.skipif(not has_configs, reason="megatron.training has no model configs")


def arguments(**changes: Any) -> Arguments:
    made = Arguments()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def model_provider(
    model_builder: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """The call that ``model_provider.py`` makes, core 0.16 to 0.18; ``config`` stands for its."""
    config = config or harness.make_config(harness.Case())
    return model_builder(
        arguments(), pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection
    )


def assert_runs_groups(model: Any) -> None:
    row = harness.make_rows(1, 1)
    before = count_attention_calls(model)
    assert run(model, row).shape == (1, row.layout.total_tokens, 64)
    calls = count_attention_calls(model)
    assert calls.prefix_grouped - before.prefix_grouped == 2
    assert calls.ordinary == before.ordinary
    # An ordinary row of two sequences with 40 tokens in common.
    tokens, bounds = torch.arange(40).repeat(2), torch.tensor([0, 40, 80], dtype=torch.int32)
    params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=40, max_seqlen_kv=40)
    assert model(tokens[None], None, None, packed_seq_params=params).shape == (1, 80, 64)
    assert count_shared_tokens(model) == (40, 80)


def test_the_builder_as_pretrain_calls_it_before_0_19(one_rank) -> None:
    # ``pretrain(..., partial(model_provider, gpt_builder), ...)``, which get_model calls.
    provider = partial(model_provider, gpt_builder)
    model = provider(pre_process=True, post_process=True)
    assert type(model) is PrefixSharingGPTModel
    assert_runs_groups(model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    assert_runs_groups(provider(pre_process=True, post_process=True, pg_collection=groups))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_legacy_models=True), "use_legacy_models=True: another builder"),
        (dict(yaml_cfg="model.yaml"), "yaml_cfg='model.yaml': another builder"),
        (dict(modelopt_enabled=True), "modelopt_enabled=True: another builder"),
        (dict(transformer_impl="inference_optimized"), "'inference_optimized' has a spec"),
    ],
)
def test_models_of_another_builder(one_rank, changes, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        gpt_builder(arguments(**changes), True, True, config=harness.make_config(harness.Case()))


def test_settings_are_refused_on_a_stage_without_layers(one_rank) -> None:
    config = harness.make_config(harness.Case())
    config.mtp_num_layers, config.num_layers = 1, 0
    with pytest.raises(ValueError, match="mtp_num_layers=1"):
        gpt_builder(arguments(), True, True, config=config)


@pytest.mark.parametrize(
    ("setting", "name"), [("qk_layernorm", "q_layernorm=<class 'me"), ("qk_l2_norm", "L2Norm")]
)
def test_layer_settings_reach_the_layers(one_rank, setting: str, name: str) -> None:
    config = harness.make_config(harness.Case())
    assert name not in repr(_stock_spec(arguments(), config, None)).replace(repr(IdentityOp), "")
    setattr(config, setting, True)
    assert name in repr(_stock_spec(arguments(), config, None)).replace(repr(IdentityOp), "")


def test_a_spec_that_is_a_function_is_called(one_rank, monkeypatch) -> None:
    """As slime's ``--spec`` of a module's function."""
    seen = []

    def make_spec(args: Any, config: Any, vp_stage: int | None) -> Any:
        seen.append((args, config, vp_stage))
        return with_sequence_parallel_norms(get_gpt_layer_local_spec(), config)

    module = ModuleType("its_specs")
    module.make_spec = make_spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "its_specs", module)
    args, config = arguments(spec=("its_specs", "make_spec")), harness.make_config(harness.Case())
    assert_runs_groups(gpt_builder(args, True, True, vp_stage=None, config=config))
    assert seen == [(args, config, None)]


@pytest.mark.skipif(has_configs, reason="megatron.training has model configs")
def test_without_a_megatron_lm_that_has_it() -> None:
    with pytest.raises(ImportError, match="before core 0.19 it builds from gpt_builder"):
        gpt_config_from_args(arguments())


COMMAND_LINE = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1
--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
--position-embedding-type rope --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer
--vocab-size 64 --train-iters 1 --lr 1e-3 --transformer-impl local --use-cpu-initialization
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion
--no-rope-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
"""


@pytest.fixture
def parsed(monkeypatch, one_rank, capsys) -> Any:
    """Parse a command line as ``pretrain_gpt.py`` does."""
    from megatron.training.arguments import parse_args, validate_args

    def parse(more: str = "") -> Any:
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *COMMAND_LINE.split(), *more.split()])
        args = validate_args(parse_args())
        args.padded_vocab_size = 64  # by its tokenizer, later
        return args

    return parse


def build_as_pretrain(model_config: Any) -> list[Any]:
    """As ``setup_model_and_optimizer`` of ``megatron.training.training``."""
    builder = model_config.get_builder_cls()(model_config)
    return builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )


@needs_training
@pytest.mark.parametrize(
    "more",
    [
        "",
        "--spec megatron_pg.mcore.local_specs rmsnorm_spec",
        "--window-size (8,0) --window-attn-skip-freq ([1,0]) --softmax-type learnable",
    ],
)
def test_the_builder_takes_the_arguments_as_they_are_parsed(parsed, more: str) -> None:
    args = parsed(more)
    model = gpt_builder(args, pre_process=True, post_process=True)
    assert type(model) is PrefixSharingGPTModel
    assert_runs_groups(model)
    kinds = [layer.self_attention.core_attention.kind for layer in model.decoder.layers]
    asked = [(8, True), (None, True)] if "--window-size" in more else [(None, False)] * 2
    assert [(kind.window, kind.has_sink) for kind in kinds] == asked


@needs_configs
@pytest.mark.parametrize("more", ["", "--spec megatron_pg.mcore.local_specs rmsnorm_spec"])
def test_the_config_as_pretrain_builds_from_it_since_0_19(parsed, more: str) -> None:
    from megatron.training.argument_utils import (
        gpt_config_from_args as stock_config_from_args,
    )
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = parsed(more)
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    (model,) = build_as_pretrain(container.model)
    assert type(model) is PrefixSharingGPTModel
    assert_runs_groups(model)
    (stock,) = build_as_pretrain(stock_config_from_args(parsed()))
    assert list(stock.state_dict()) == list(model.state_dict())
    assert not any(isinstance(m, PrefixGroupedSelfAttention) for m in stock.modules())


@needs_configs
def test_a_config_is_refused_when_it_is_built(parsed) -> None:
    args = parsed("--hidden-dropout 0.1")
    model_config = gpt_config_from_args(args)
    model_config.transformer.num_layers = 0  # as on a stage that holds none
    with pytest.raises(ValueError, match="hidden_dropout=0.1"):
        build_as_pretrain(model_config)
    with pytest.raises(NotImplementedError, match="model_config_cls=Arguments builds layers"):
        gpt_config_from_args(args, model_config_cls=Arguments)


@needs_configs
def test_specs_that_megatron_lm_takes_as_functions(parsed) -> None:
    seen = []

    def with_stage(config: Any, vp_stage: int | None = None) -> Any:
        seen.append((type(config).__name__, vp_stage))
        return get_gpt_layer_local_spec(normalization="RMSNorm")

    for function in (with_stage, lambda config: with_stage(config)):
        model_config = gpt_config_from_args(parsed())
        model_config.transformer_layer_spec = function
        (model,) = build_as_pretrain(model_config)
        assert_runs_groups(model)
        assert model_config.transformer_layer_spec is function, "the caller's config stays"
    assert seen == [("PrefixGroupedGPTModelConfig", None)] * 2


@needs_configs
def test_stages_exchange_shapes(parsed) -> None:
    config = harness.make_config(harness.Case())
    config.pipeline_model_parallel_size, config.variable_seq_lengths = 2, False
    assert gpt_config_from_args(parsed(), config).transformer.variable_seq_lengths


def as_slime_builds(provider: Any) -> Any:
    """The call that its ``model_provider`` wraps; no arguments, no configuration."""
    assert "vp_stage" in signature(provider).parameters
    return provider(pre_process=True, post_process=True, vp_stage=None)


def as_slime_runs(model: Any, samples: list[torch.Tensor]) -> torch.Tensor:
    """One microbatch as its ``get_batch`` makes it, padding as a sequence of its own at the end."""
    tokens = torch.cat(samples)
    padding = -len(tokens) % 128
    ends = torch.tensor([0, *[len(s) for s in samples], padding]).cumsum(0)
    tokens = torch.nn.functional.pad(tokens, (0, padding))
    bounds, longest = ends.to(torch.int), int(ends.diff().max())
    return model(
        input_ids=tokens[None],
        position_ids=None,
        attention_mask=None,
        labels=None,
        packed_seq_params=PackedSeqParams(
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            qkv_format="thd",
        ),
        loss_mask=torch.ones(1, len(tokens)),
    )


def provider_of_the_example() -> Any:
    return runpy.run_path(str(ROOT / "examples/slime_provider.py"))["model_provider"]


def assert_equals_the_stock_model(model: Any, bound: float) -> None:
    g = torch.Generator().manual_seed(0)
    prompt, *responses = (torch.randint(0, 64, (n,), generator=g) for n in (40, 9, 3, 17, 17))
    samples = [torch.cat([prompt, response]) for response in responses]
    (stock,) = build(Variant(case=harness.Case(dtype=torch.float64)), model.config, ours=False)
    stock.load_state_dict(model.state_dict())
    stock.to(next(model.parameters()).dtype)
    before = count_shared_tokens(model)
    got, want = as_slime_runs(model, samples), as_slime_runs(stock, samples)
    assert got.shape == want.shape == (1, 256, 64)
    cotangent = torch.randn(want.shape, generator=g, dtype=torch.float64).to(want.dtype)
    cotangent[0, 206:] = 0
    pairs = {"logits": (got.detach(), want.detach())}
    got.backward(cotangent)
    want.backward(cotangent)
    controls = dict(stock.named_parameters())
    pairs |= {n: (p.grad, controls[n].grad) for n, p in model.named_parameters()}
    harness.assert_within(
        {n: float((a - b).norm() / b.norm()) for n, (a, b) in pairs.items()}, bound
    )
    counted = count_shared_tokens(model)
    # The padding stays; its zeros are equal to no sample's first tokens.
    assert counted.unique - before.unique == 40 + 9 + 3 + 17 + 17 + 50
    assert counted.logical - before.logical == 256


def test_the_example_as_slime_calls_it(one_rank, monkeypatch) -> None:
    training, parsing = ModuleType("megatron.training"), ModuleType("megatron.training.arguments")
    training.get_args = arguments  # type: ignore[attr-defined]
    config = harness.make_config(harness.Case())
    parsing.core_transformer_config_from_args = lambda args: config  # type: ignore[attr-defined]
    for module in (training, parsing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = as_slime_builds(provider_of_the_example()).double()
    assert type(model) is PrefixSharingGPTModel
    assert_equals_the_stock_model(model, 1e-9)


@needs_training
def test_the_example_from_a_command_line(parsed, monkeypatch) -> None:
    """As in slime's scripts: dropouts off, softmax in fp32, full recompute."""
    from megatron.training import global_vars

    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    args = parsed(f"{recompute} --attention-softmax-in-fp32")
    args.variable_seq_lengths, args.moe_token_dispatcher_type = True, "alltoall"
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    model = as_slime_builds(provider_of_the_example())
    assert model.config.recompute_granularity == "full"
    assert_equals_the_stock_model(model, 1e-4)
