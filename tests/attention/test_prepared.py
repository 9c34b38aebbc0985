"""What backends make of a row: once for each kind of visibility, and gone with the row."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch

from megatron_pg import PackedLayout, PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import AttentionKind, interface
from tests.utils import CPU_BACKENDS


def two_groups() -> PackedLayout:
    return pack_trees([PrefixTree.from_group(5, [3, 2]), PrefixTree.from_group(4, [2])], 8)


def attend(layout: PackedLayout, backend: str, kind: AttentionKind | None = None) -> torch.Tensor:
    q, k, v = torch.randn(3, layout.total_tokens, 2, 16, requires_grad=True)
    return prefix_grouped_attention(q, k, v, layout, backend=backend, kind=kind)


@pytest.fixture
def windows(monkeypatch) -> list[int | None]:
    """The windows of the plans that were made."""
    made, make = [], interface.make_attention_plan
    monkeypatch.setattr(
        interface,
        "make_attention_plan",
        lambda layout, window: made.append(window) or make(layout, window),
    )
    return made


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_is_prepared_once_in_all_layers_and_passes(backend, windows) -> None:
    layout = two_groups()
    with torch.inference_mode():
        attend(layout, backend)
    for _ in range(3):
        attend(layout, backend).sum().backward()
    for scale in (0.5, 0.25):
        attend(layout, backend, AttentionKind(softmax_scale=scale))
    assert windows == [None]
    attend(two_groups(), backend)
    assert windows == [None, None]


def test_a_row_is_prepared_once_for_each_window(windows) -> None:
    layout = two_groups()
    for window in (2, None, 2, 1, None):
        attend(layout, "reference", AttentionKind(window=window, softcap=5.0))
    assert windows == [2, None, 1]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_it_goes_with_the_row_at_once(backend) -> None:
    layout = two_groups()
    attend(layout, backend).sum().backward()
    (prepared,) = vars(layout)["_derived"].values()
    held = weakref.ref(prepared)
    gc.disable()
    try:
        del layout, prepared
        assert held() is None, "what was prepared refers to the layout, or something else to it"
    finally:
        gc.enable()


def test_a_row_that_is_sent_elsewhere_leaves_it_behind() -> None:
    layout = two_groups()
    attend(layout, "reference")
    sent = pickle.loads(pickle.dumps(layout))
    assert "_derived" in vars(layout) and "_derived" not in vars(sent)
    assert attend(sent, "reference").shape == (layout.total_tokens, 2, 16)
