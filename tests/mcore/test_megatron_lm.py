"""Megatron-LM's seams: what its scripts build, by the calls that each version makes."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp

from megatron_pg.mcore import (
    PrefixGroupedGPTModel,
    count_attention_calls,
    gpt_builder,
    gpt_config_from_args,
)
from megatron_pg.mcore.builder import _stock_spec
from megatron_pg.mcore.layers import PrefixGroupedSelfAttention
from tests.mcore import harness
from tests.mcore.test_spec import Arguments, run

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


def test_the_builder_as_pretrain_calls_it_before_0_19(one_rank) -> None:
    # ``pretrain(..., partial(model_provider, gpt_builder), ...)``, which get_model calls.
    provider = partial(model_provider, gpt_builder)
    model = provider(pre_process=True, post_process=True)
    assert type(model) is PrefixGroupedGPTModel
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
@pytest.mark.parametrize("more", ["", "--spec megatron_pg.mcore.local_specs rmsnorm_spec"])
def test_the_builder_takes_the_arguments_as_they_are_parsed(parsed, more: str) -> None:
    args = parsed(more)
    model = gpt_builder(args, pre_process=True, post_process=True)
    assert type(model) is PrefixGroupedGPTModel
    assert_runs_groups(model)


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
    assert type(model) is PrefixGroupedGPTModel
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
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

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
