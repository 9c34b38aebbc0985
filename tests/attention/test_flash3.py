"""FlashAttention-3: what its operators are told, and when it is taken.

A stub with the operators' schemas stands for the package; its arithmetic is written out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.attention import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    AttentionKind,
    ResidentKV,
    available_backends,
    describe_backend,
    make_attention_plan,
    select_backend,
)
from megatron_pg.attention.backends.flash3 import Flash3Backend, package_refusal
from megatron_pg.attention.backends.torch_cuda import TorchFlashBackend
from megatron_pg.attention.kernels import merge_plain
from tests.attention.flash_rule import FLASH3_SCHEMAS, DenseFlashAttention
from tests.attention.test_attention import gradients
from tests.attention.test_kinds_in_backends import (
    NAMES,
    compare_random_forests,
    ours,
    random_inputs,
    truth,
)
from tests.utils import assert_close

FLASH3 = ATTENTION_BACKENDS["flash3"]


def inputs(**changes: object) -> AttentionInputs:
    fields = dict(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=128)
    return AttentionInputs(**(fields | dict(num_heads=4, num_kv_heads=2) | changes))


@pytest.fixture
def define(monkeypatch) -> Iterator[Callable[..., DenseFlashAttention]]:
    """Puts the package in place, of these schemas and built with these flags."""
    libraries: list[torch.library.Library] = []

    def package(schemas: dict[str, str], **flags: bool) -> DenseFlashAttention:
        rule = DenseFlashAttention()
        library = torch.library.Library("flash_attn_3", "DEF")
        libraries.append(library)
        for name, schema in schemas.items():
            library.define(schema)
            function = rule.flash3_forward if name == "fwd" else rule.flash3_backward
            library.impl(name, function, "CPU")
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module("flash_attn_interface"))
        config = module("flash_attn_config")
        config.CONFIG = {"build_flags": flags}
        monkeypatch.setitem(sys.modules, "flash_attn_config", config)
        package_refusal.cache_clear()
        return rule

    yield package
    for library in libraries:
        library._destroy()
    package_refusal.cache_clear()


def module(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    return made


@pytest.fixture
def rule(define, monkeypatch) -> DenseFlashAttention:
    """The package, and a backend that takes CPU tensors of any type."""
    monkeypatch.setattr(Flash3Backend, "refusal", lambda self, inputs: None)
    return define(FLASH3_SCHEMAS)


@pytest.fixture
def hopper(monkeypatch) -> Callable[..., None]:
    """A CUDA device of the given compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)

    pretend(9, 0)
    return pretend


@pytest.mark.parametrize("is_divided", [False, True], ids=["whole", "resident"])
def test_what_the_kernels_are_told_is_right(rule, is_divided) -> None:
    compare_random_forests("flash3", is_divided)
    assert rule.num_unused > 100 and rule.num_lone == 0, "gaps are rows that no sequence uses"


def test_heads_of_192_with_values_of_128_are_taken_as_they_are(rule) -> None:
    """The stub refuses other heads than a kernel's; the second pair is padded."""
    layout = pack_trees([PrefixTree.from_group(7, [3, 4]), PrefixTree.from_group(5, [2, 2])], 8)
    for head_dim, value_dim in ((192, 128), (128, 192), (192, 96)):
        assert FLASH3.takes_value_dim(head_dim, value_dim) is ((head_dim, value_dim) == (192, 128))
        kind = AttentionKind(value_dim=value_dim)
        given, kept, dout = random_inputs(layout, [], (2, 1), head_dim, kind)
        got = gradients(ours(layout, kind, "flash3", []), given, dout)
        want, _ = truth(layout, kind, given, kept, dout)
        for name, g, w in zip(NAMES, got, want):
            assert_close(f"{head_dim} {value_dim} {name}", g, w, 1e-10)


@pytest.mark.parametrize("has_sink", [False, True])
def test_a_row_of_many_passes_is_rounded_once(rule, monkeypatch, has_sink) -> None:
    """Bit for bit the same whether passes are merged one after the other or all in one call."""
    samples = [[1] * 5, [1, 1, 2], [1, 1, 1, 3, 3], [1, 1, 1, 3, 4, 4], [1, 1, 1, 3, 4, 5, 6]]
    trees = [PrefixTree.from_sequences([*samples, [7, 8, 9]]), PrefixTree.from_group(5, [2, 3])]
    layout, kind = pack_trees(trees, 8), AttentionKind(has_sink=has_sink)
    assert layout.forest.depth >= 3
    given, _, dout = random_inputs(layout, [], (4, 2), 16, kind)
    given, dout = [x.bfloat16() for x in given], dout.bfloat16()
    found = []
    for most in (1, 2, 99):
        monkeypatch.setattr(merge_plain, "MAX_PASSES", most)
        found.append(gradients(ours(layout, kind, "flash3", []), given, dout))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], results))


def test_deterministic_algorithms_are_asked_for(rule) -> None:
    """The stub compares what it is told with the setting."""
    layout = pack_trees([PrefixTree.from_group(5, [2, 3])])
    given, _, dout = random_inputs(layout, [], (1, 1), 8, AttentionKind())
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            gradients(ours(layout, AttentionKind(), "flash3", []), given, dout)
    finally:
        torch.use_deterministic_algorithms(before)


def test_gaps_belong_to_the_sequence_before_them() -> None:
    """So the longest sequence is the longest span, however far the next one is."""
    trees = [PrefixTree.from_group(40, [3, 4]), PrefixTree.from_group(60, [5, 1])]
    layout = pack_trees(trees, 16)
    first, second = FLASH3.prepare(make_attention_plan(layout), torch.device("cpu")).passes
    told = second.arguments
    assert told.cu_seqlens_q.tolist() == [0, 67, 73] and told.seqused_q.tolist() == [7, 6]
    assert told.cu_seqlens_kv.tolist() == [0, 47, 107] and told.seqused_kv.tolist() == [40, 60]
    assert (told.max_seqlen_q, told.max_seqlen_kv, told.causal) == (7, 60, False)
    told = first.arguments
    # The row's padding is a gap too.
    assert told.cu_seqlens_q.tolist() == told.cu_seqlens_kv.tolist()
    assert told.cu_seqlens_q.tolist() == [0, 40, 43, 47, 107, 112, 128]
    assert told.seqused_q.tolist() == told.seqused_kv.tolist() == [40, 3, 4, 60, 5, 1]
    plan = make_attention_plan(pack_trees(trees))
    told = FLASH3.prepare(plan, torch.device("cpu")).passes[0].arguments
    assert told.seqused_q is told.seqused_kv is None and told.causal


def test_resident_rows_whose_keys_have_gaps() -> None:
    from megatron_pg.tree import ResidentSpans

    lone = PrefixTree(
        segment_lens=np.array([1]),
        segment_parents=np.array([-1]),
        sample_segments=np.array([0]),
        resident_lens=np.array([3]),
    )
    spans = ResidentSpans(0, np.array([[0, 1], [1, 2]]), np.array([[0, 3], [5, 8]]))
    plan = make_attention_plan(pack_trees([lone] * 2, 1, [spans]))
    told = FLASH3.prepare(plan, torch.device("cpu")).passes[-1].arguments
    assert told.seqused_q is None and told.seqused_kv.tolist() == [3, 3]
    assert (told.max_seqlen_q, told.max_seqlen_kv) == (1, 3)


def test_it_comes_first_on_hopper(define, hopper) -> None:
    assert select_backend(inputs()).name == "flash"
    define(FLASH3_SCHEMAS)
    assert select_backend(inputs()).name == "flash3"
    assert available_backends(inputs())[:2] == ["flash3", "flash"]
    assert describe_backend("flash3", "cpu") == "flash3, plain merge"
    kind = AttentionKind(window=4, softcap=5.0, has_sink=True, value_dim=64)
    assert select_backend(inputs(kind=kind)).name == "flash3"
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        hopper(*capability)
        assert select_backend(inputs()).name == "flash"
        with pytest.raises(ValueError, match=r"needs compute capability 9\.0 \(Hopper\), cuda:0"):
            select_backend(inputs(), "flash3")


OTHER_SCHEMAS = {
    "without flash_attn_3::bwd": {"fwd": FLASH3_SCHEMAS["fwd"]},
    "a flash_attn_3::fwd of other arguments": FLASH3_SCHEMAS
    | {"fwd": FLASH3_SCHEMAS["fwd"].replace("int num_splits = 0", "int pieces = 0")},
    "a flash_attn_3::bwd of other arguments": FLASH3_SCHEMAS
    | {"bwd": FLASH3_SCHEMAS["bwd"].replace("Tensor softmax_lse,", "Tensor softmax_lse, int b,")},
}


@pytest.mark.parametrize("words", OTHER_SCHEMAS)
def test_packages_of_other_operators_are_passed_over(define, hopper, words) -> None:
    define(OTHER_SCHEMAS[words])
    assert select_backend(inputs()).name == "flash"
    with pytest.raises(ValueError, match=f"{words}; install a FlashAttention-3 that was built for"):
        select_backend(inputs(), "flash3")


def test_packages_that_cannot_be_imported(define, hopper, monkeypatch, tmp_path) -> None:
    package_refusal.cache_clear()
    with pytest.raises(ValueError, match=r"FlashAttention-3 \(flash_attn_interface\) is not insta"):
        select_backend(inputs(), "flash3")
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.12: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    package_refusal.cache_clear()
    with pytest.raises(ValueError, match=r"cannot import flash_attn_interface \(OSError: libcudar"):
        select_backend(inputs(), "flash3")
    assert select_backend(inputs()).name == "flash"
    assert package_refusal.cache_info().misses == 1, "a package is looked at once"


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["BACKWARD"], {}, "built without BACKWARD"),
        (["VARLEN"], {}, "built without VARLEN"),
        (["FP16"], dict(dtype=torch.float16), "built without FP16"),
        (["LOCAL"], dict(kind=AttentionKind(window=4)), "built without LOCAL"),
        (["SOFTCAP"], dict(kind=AttentionKind(softcap=4.0)), "built without SOFTCAP"),
        (["HDIM192", "HDIM256"], dict(head_dim=136), "built without HDIM192"),
    ],
)
def test_what_was_left_out_of_a_build_is_refused(define, hopper, flags, changes, message) -> None:
    flags = {f"FLASHATTENTION_DISABLE_{flag}": True for flag in flags}
    define(FLASH3_SCHEMAS, **flags)
    with pytest.raises(ValueError, match=message):
        select_backend(inputs(**changes), "flash3")
    if changes:
        assert select_backend(inputs(), "flash3").name == "flash3"


def test_a_size_that_was_left_out_takes_the_next(define, hopper) -> None:
    define(FLASH3_SCHEMAS, FLASHATTENTION_DISABLE_HDIM96=True)
    assert select_backend(inputs(head_dim=72), "flash3").name == "flash3"
    define_flags = dict(FLASH_ATTENTION_DISABLE_HDIMDIFF192=True)
    sys.modules["flash_attn_config"].CONFIG = {"build_flags": define_flags}
    assert not FLASH3.takes_value_dim(192, 128)


def test_large_heads_are_not_deterministic(define, hopper) -> None:
    define(FLASH3_SCHEMAS)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        assert select_backend(inputs(head_dim=192)).name == "flash3"
        assert select_backend(inputs(head_dim=200)).name == "flash"
        torch.use_deterministic_algorithms(False)
        assert select_backend(inputs(head_dim=200)).name == "flash3"
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("active", "version", "capability", "message"),
    [
        ("FA3", "2.13.0+cu130", (9, 0), None),
        ("FA3", "2.14.1", (9, 0), None),
        ("FA3", "2.11.0+cu130", (9, 0), r"trains with FA3 from PyTorch 2\.13 on, this is 2\.11"),
        ("FA3", "2.13.0", (8, 0), r"FA3 activated, which needs compute capability 9\.0, cuda:0 ha"),
        ("FA4", "2.13.0", (9, 0), r"not FA4; call torch\.nn\.attention\.restore_flash_attention_"),
    ],
)
def test_what_is_activated_in_torch(
    hopper, monkeypatch, active, version, capability, message
) -> None:
    assert describe_backend("flash", "cpu") == "flash, plain merge"
    hopper(*capability)
    monkeypatch.setattr("torch.__version__", version)
    current = lambda: active  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", current, raising=False)
    if message is None:
        assert isinstance(select_backend(inputs(), "flash"), TorchFlashBackend)
        assert describe_backend("flash", "cpu") == f"flash, {active}, plain merge"
        return
    with pytest.raises(ValueError, match=message):
        select_backend(inputs(), "flash")


def test_gradients_of_resident_rows_reach_them(rule) -> None:
    layout = pack_trees([PrefixTree.from_group(5, [2, 3]).without_prefix([4, 0, 0])], 1, [_four()])
    kept = torch.randn(2, 4, 1, 8, dtype=torch.float64)
    given, _, dout = random_inputs(layout, [], (2, 1), 8, AttentionKind())
    resident = [ResidentKV(*kept)]
    gradients(ours(layout, AttentionKind(), "flash3", resident), given, dout)
    _, want = truth(layout, AttentionKind(), given, [tuple(kept)], dout)
    for name, g, w in zip(("dk", "dv"), resident[0].grads(), want):
        assert_close(name, g, w, 1e-10)


def _four():
    from megatron_pg.tree import ResidentSpans

    return ResidentSpans(0, np.array([[0, 6]]), np.array([[0, 4]]))
