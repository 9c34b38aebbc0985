"""Wrapping specs: what changes, what does not, and what is refused."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_pg.attention import AttentionInputs, available_backends, interface
from megatron_pg.mcore import (
    PrefixGroupedGPTModel,
    PrefixGroupedSeqParams,
    attention_backends,
    count_attention_calls,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.layers import prefix_grouped_core_attention
from tests.mcore import cases, harness
from tests.utils import assert_close

pytestmark = pytest.mark.megatron

LAYERS = {
    "plain": dict(),
    "rmsnorm": dict(normalization="RMSNorm"),
    "qk_layernorm": dict(qk_layernorm=True),
    "moe": dict(num_experts=4, moe_grouped_gemm=False),
}


def has_transformer_engine() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


def build(spec, config=None, model_cls=GPTModel):
    config = config or harness.make_config(harness.Case(config=dict(normalization="LayerNorm")))
    # Megatron's own norms are made in fp32 whatever params_dtype says.
    model = model_cls(config, spec, vocab_size=64, max_sequence_length=64)
    return model.to(config.params_dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_the_given_spec_stays_and_the_copy_differs_in_two_classes(name: str) -> None:
    spec = get_gpt_layer_local_spec(**LAYERS[name])
    before = repr(spec)
    wrapped = with_prefix_grouped_attention(spec)
    assert repr(spec) == before
    attention = wrapped.submodules.self_attention
    assert issubclass(attention.module, SelfAttention) and attention.module is not SelfAttention
    assert issubclass(attention.submodules.core_attention, DotProductAttention)
    restored = replace(
        wrapped,
        submodules=replace(
            wrapped.submodules,
            self_attention=replace(
                attention,
                module=SelfAttention,
                submodules=replace(attention.submodules, core_attention=DotProductAttention),
            ),
        ),
    )
    if name == "moe":
        assert "PrefixGroupedRouter" in repr(restored) and "PrefixGrouped" not in before
        restored = replace(restored, module=spec.module)
        restored.submodules.mlp = spec.submodules.mlp
    assert repr(restored) == before


@pytest.mark.parametrize("name", ["plain", "rmsnorm", "qk_layernorm"])
def test_state_dict_keys_and_shapes_are_the_stock_ones(one_rank, name: str) -> None:
    extra = {k: v for k, v in LAYERS[name].items() if k != "normalization"}
    norm = LAYERS[name].get("normalization", "LayerNorm")
    config = harness.make_config(
        harness.Case(config=dict(normalization=norm, qk_layernorm="qk_layernorm" in extra))
    )
    spec = get_gpt_layer_local_spec(**LAYERS[name])
    stock = build(spec, config)
    ours = build(with_prefix_grouped_attention(spec), config, PrefixGroupedGPTModel)
    shapes = {n: None if t is None else t.shape for n, t in stock.state_dict().items()}
    assert shapes == {n: None if t is None else t.shape for n, t in ours.state_dict().items()}
    assert len(shapes) > 10
    sharded = stock.sharded_state_dict()
    assert sharded.keys() == ours.sharded_state_dict().keys()


def test_block_specs_keep_their_kind(one_rank) -> None:
    config = harness.make_config(harness.Case(config=dict(normalization="LayerNorm")))
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    wrapped = with_prefix_grouped_attention(block)
    assert type(wrapped) is type(block) and len(wrapped.layer_specs) == config.num_layers
    build(wrapped, config)
    module = with_prefix_grouped_attention(ModuleSpec(module=TransformerBlock, submodules=block))
    assert module.module is TransformerBlock
    first = module.submodules.layer_specs[0].submodules.self_attention.module
    assert first is wrapped.layer_specs[0].submodules.self_attention.module


def test_wrapping_twice_is_wrapping_once() -> None:
    once = with_prefix_grouped_attention(get_gpt_layer_local_spec())
    assert repr(with_prefix_grouped_attention(once)) == repr(once)


def test_the_backend_of_a_wrapped_spec_stays() -> None:
    once = with_prefix_grouped_attention(get_gpt_layer_local_spec(), backend="reference")
    for backend in (None, "reference"):
        assert repr(with_prefix_grouped_attention(once, backend)) == repr(once)
        core = with_prefix_grouped_attention(once, backend).submodules.self_attention.submodules
        assert core.core_attention.attention_backend == "reference"
    for backend in ("auto", "cpu"):
        with pytest.raises(ValueError, match=f"backend='{backend}', but .* with 'reference'"):
            with_prefix_grouped_attention(once, backend)


def test_the_backend_is_named_in_the_spec() -> None:
    spec = with_prefix_grouped_attention(get_gpt_layer_local_spec(), backend="reference")
    core = spec.submodules.self_attention.submodules.core_attention
    assert core.attention_backend == "reference"
    with pytest.raises(ValueError, match="'tirton' is unknown"):
        with_prefix_grouped_attention(get_gpt_layer_local_spec(), backend="tirton")


def run(model, row):
    params = PrefixGroupedSeqParams.from_layout(row.layout)
    tokens = row.layout.pack_tokens(row.sequences)
    return model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def test_stock_model_with_a_wrapped_spec_returns_logits(one_rank) -> None:
    case = harness.Case()
    config = harness.make_config(case)
    block = with_sequence_parallel_norms(get_gpt_layer_local_spec(), config)
    model = build(with_prefix_grouped_attention(block), config)
    row = harness.make_rows(3, 4)
    logits = run(model, row)[0]
    assert logits.shape == (row.layout.total_tokens, 64)
    for i, sequence in enumerate(row.sequences):
        n = len(sequence)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        alone = model(sequence[None], torch.arange(n)[None], mask)[0]
        assert_close(f"sample {i}", logits[row.layout.sample_indices(i)], alone, 1e-12)
    calls = count_attention_calls(model)
    assert calls.prefix_grouped == config.num_layers
    assert calls.ordinary == config.num_layers * len(row.sequences)


@pytest.mark.parametrize("name", ["plain", "window_none", "window_freq", "window_selective"])
def test_ordinary_batches_are_those_of_the_stock_spec_bit_by_bit(one_rank, name) -> None:
    case = cases.EQUIVALENCE[name]
    models = [
        harness.build(case, harness.make_config(case), packed=packed)[0] for packed in (True, False)
    ]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1)
    cotangent = torch.randn(2, 9, 64, dtype=case.dtype)
    results = []
    for model in models:
        logits = model(tokens, torch.arange(9).expand(2, 9), mask)
        (logits * cotangent).sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert count_attention_calls(models[0]) == (0, case.num_layers * (2 if "sel" in name else 1))
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 0 and torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_the_backend_is_chosen_when_the_model_is_built(one_rank, monkeypatch, backend) -> None:
    config = harness.make_config(harness.Case())
    block = with_sequence_parallel_norms(get_gpt_layer_local_spec(), config)
    model = build(with_prefix_grouped_attention(block, backend), config)
    core = model.decoder.layers[0].self_attention.core_attention
    first = available_backends(AttentionInputs(torch.device("cpu"), torch.float64, 8, 4, 2))[0]
    assert attention_backends(model) == (first if backend == "auto" else backend,)

    def chosen_again(*args: object) -> None:
        raise AssertionError("a layer's call chooses a backend")

    monkeypatch.setattr(interface, "select_backend", chosen_again)
    row = harness.make_rows(3, 4)
    assert run(model, row).shape == (1, row.layout.total_tokens, 64)
    other = torch.zeros(row.layout.total_tokens, 4, 8, dtype=torch.float8_e5m2)
    if backend != "reference":
        with pytest.raises(ValueError, match="chosen before, takes .*build it with those"):
            core.attend(other, other, other, row.layout, ())


def test_siblings_are_isolated_through_the_whole_model(one_rank) -> None:
    case = harness.Case(num_layers=3)
    config = harness.make_config(case)
    (model,) = harness.build(case, config, packed=True)
    row = harness.make_rows(5, 1)
    own = row.layout.multiplicity == 1
    first = row.layout.sample_indices(0)
    first = first[own[first]]
    tokens = row.layout.pack_tokens(row.sequences)
    outputs = []
    for change in (0, 1):
        params = PrefixGroupedSeqParams.from_layout(row.layout)
        varied = tokens.clone()
        varied[first] = (tokens[first] + change) % 64
        outputs.append(
            model(varied[None], params.position_ids[None], None, packed_seq_params=params)[0]
        )
    changed = (outputs[0] != outputs[1]).any(-1)
    assert changed[first].all()
    changed[first] = False
    assert not changed.any(), "a token outside the changed response differs"


def test_unwrapped_attention_refuses_packed_groups(one_rank) -> None:
    config = harness.make_config(harness.Case(config=dict(normalization="LayerNorm")))
    model = build(get_gpt_layer_local_spec(), config)
    with pytest.raises(AssertionError, match="Packed sequence is not supported"):
        run(model, harness.make_rows(0, 1))


def with_attention(cls: type) -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    return replace(spec, submodules=replace(spec.submodules, self_attention=ModuleSpec(module=cls)))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (lambda: "gpt", ValueError, "expected a ModuleSpec"),
        (
            lambda: with_attention(CrossAttention),
            NotImplementedError,
            "self_attention is CrossAttention",
        ),
        (
            lambda: ModuleSpec(module=torch.nn.Linear, submodules=None),
            NotImplementedError,
            "Linear has no self_attention",
        ),
    ],
)
def test_refusals(spec, error, message: str) -> None:
    with pytest.raises(error, match=message):
        with_prefix_grouped_attention(spec())


@pytest.mark.parametrize("name", ["layernorm_spec", "rmsnorm_spec", "rmsnorm_qk_layernorm_spec"])
def test_ready_specs_load_as_megatron_lm_loads_them(name: str) -> None:
    spec = import_module(("megatron_pg.mcore.local_specs", name))
    assert isinstance(spec, ModuleSpec)
    assert spec.submodules.self_attention.module.__name__ == "PrefixGroupedSelfAttention"


needs_te = pytest.mark.skipif(
    not has_transformer_engine(), reason="Transformer Engine is not installed"
)


@needs_te
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_transformer_engine_spec_is_wrapped(qk_layernorm: bool) -> None:
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    wrapped = with_prefix_grouped_attention(spec)
    given = spec.submodules.self_attention.submodules.core_attention
    ours = wrapped.submodules.self_attention.submodules.core_attention
    assert issubclass(ours, given) and ours.__name__ == "PrefixGroupedTEDotProductAttention"
    assert isinstance(import_module(("megatron_pg.mcore.te_specs", "spec")), ModuleSpec)


@needs_te
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_transformer_engine_keys_are_the_stock_ones(one_rank, monkeypatch, qk_layernorm) -> None:
    # Its modules ask for a device when they are built, but need none to be laid out.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    case = harness.Case(
        dtype=torch.float32, config=dict(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    )
    config = harness.make_config(case)
    stock = build(spec, config)
    model = build(with_prefix_grouped_attention(spec), config, PrefixGroupedGPTModel)
    assert list(stock.state_dict()) == list(model.state_dict())
    assert any("_extra_state" in key for key in model.state_dict())
    assert stock.sharded_state_dict().keys() == model.sharded_state_dict().keys()


@needs_te
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_latent_attention_of_transformer_engine_is_wrapped(qk_layernorm: bool) -> None:
    spec = get_gpt_layer_with_transformer_engine_spec(
        multi_latent_attention=True, qk_layernorm=qk_layernorm
    )
    attention = with_prefix_grouped_attention(spec).submodules.self_attention
    assert attention.module.__name__ == "PrefixGroupedMLASelfAttention"
    # It takes the sizes of heads by itself.
    core = attention.submodules.core_attention
    assert core.__name__ == "PrefixGroupedTEDotProductAttention"


class Arguments:
    """What Megatron-LM's parsed arguments hold, as far as the builder reads them."""

    padded_vocab_size = 64
    max_position_embeddings = 64
    untie_embeddings_and_output_weights = True
    position_embedding_type = "rope"
    rotary_percent = 1.0
    rotary_base = 10000
    transformer_impl = "local"
    spec = None


def test_gpt_builder_builds_what_the_arguments_say(one_rank) -> None:
    from megatron_pg.mcore import gpt_builder

    config = harness.make_config(harness.Case())
    model = gpt_builder(Arguments(), True, True, config=config)
    row = harness.make_rows(1, 1)
    assert run(model, row).shape == (1, row.layout.total_tokens, 64)
    arguments = Arguments()
    arguments.spec = ("megatron_pg.mcore.local_specs", "rmsnorm_spec")
    named = gpt_builder(arguments, True, True, config=config)
    assert list(named.state_dict()) == list(model.state_dict())
    config.pipeline_model_parallel_size, config.variable_seq_lengths = 2, False
    gpt_builder(Arguments(), True, False, config=config)
    assert config.variable_seq_lengths


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("flash", {}, "flash needs tensors on cuda, got cpu"),
        ("cpu_fused", dict(kv_channels=12), "takes head_dim in multiples of 8, got 12"),
        ("cpu", dict(params_dtype=torch.float8_e5m2), "got torch.float8_e5m2"),
        ("cpu", dict(softmax_scale=-0.5), "softmax_scale=-0.5 must be finite and above 0"),
    ],
)
def test_backends_that_cannot_run_the_model_are_refused_when_it_is_built(
    one_rank, backend, changes, message
) -> None:
    config = harness.make_config(harness.Case(config=dict(normalization="LayerNorm")))
    for name, value in changes.items():
        setattr(config, name, value)
    spec = with_prefix_grouped_attention(get_gpt_layer_local_spec(), backend)
    with pytest.raises(ValueError, match=message):
        build(spec, config)


class BareCore(torch.nn.Module):
    """As much of a core attention as reads its configuration."""

    def __init__(self, config, layer_number, softmax_scale=None):
        super().__init__()
        self.config = config


class CoreOfItsOwn(BareCore):
    """Gives even layers a window, as models of a framework do, and keeps its offset in a shape."""

    def __init__(self, config, layer_number, softmax_scale=None):
        config = copy.copy(config)
        config.window_size = (5, 0) if layer_number % 2 == 0 else None
        super().__init__(config, layer_number, softmax_scale)
        self.softmax_offset = torch.nn.Parameter(torch.randn(1, 4, 1, 1))


def test_a_core_s_own_configuration_says_what_it_computes(one_rank) -> None:
    config = harness.make_config(harness.Case(config=dict(softmax_type="learnable")))
    build = prefix_grouped_core_attention(CoreOfItsOwn, "reference")
    cores = [build(config, number) for number in (1, 2)]
    assert [core.kind.window for core in cores] == [None, 5] and config.window_size is None
    for core in cores:
        sink = core.sink(torch.device("cpu"))
        assert core.kind.has_sink and torch.equal(sink, core.softmax_offset.flatten())
        sink.sum().backward()
        assert torch.equal(core.softmax_offset.grad, torch.ones(1, 4, 1, 1))
    config.softmax_type = "vanilla"
    assert build(config, 1).sink(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("changes", "capability", "message"),
    [
        ({}, (9, 0), None),
        (dict(params_dtype=torch.float32), (9, 0), None),  # cast later, as by Float16Module
        (dict(kv_channels=60), (9, 0), "head_dim in multiples of 8 up to 256, got 60"),
        (dict(kv_channels=264), (9, 0), "head_dim in multiples of 8 up to 256, got 264"),
        ({}, (7, 5), r"compute capability 8.0 \(Ampere\) or newer, cuda:0 has 7.5"),
    ],
)
def test_devices_that_cannot_run_the_model(monkeypatch, changes, capability, message) -> None:
    config = harness.make_config(harness.Case(dtype=torch.bfloat16))
    config.kv_channels = 64
    for name, value in changes.items():
        setattr(config, name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    core = prefix_grouped_core_attention(BareCore, "auto")
    if message is None:
        core(config, 1)
        return
    with pytest.raises(ValueError, match=message):
        core(config, 1)
