"""What training steps do on a CUDA device: what lives there, what is launched, sent, waited for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("megatron.core")

from tests.fake_h100.cases import CASES  # noqa: E402
from tests.fake_h100.record import Record  # noqa: E402
from tests.fake_h100.steps import Seen, train  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.megatron

# Kernels of backends that merge passes.
FORWARD = {
    "flash": "aten._flash_attention_forward.default",
    "flash3": "flash_attn_3.fwd.default",
    "flash_attn": "flash_attn.varlen_fwd",
}
# Rows of whole groups, and of the two halves of a group whose prompt stays.
WHOLE, DIVIDED = [224, 224], [193, 193]


@pytest.fixture(scope="module")
def seen(device_ranks: Pool) -> Callable[[str], Seen]:
    """What a case did; each runs once, for all items that judge it."""

    @functools.cache
    def run(name: str) -> Seen:
        (found,) = device_ranks.run(1, train, CASES[name], timeout=300)
        return found

    return run


@pytest.mark.parametrize("name", CASES)
def test_everything_lives_on_the_device(seen, name: str) -> None:
    """Weights in bf16, gradients added up in fp32, by the backend that was meant."""
    found = seen(name)
    assert found.devices == {"cuda:0"} and found.dtypes == {torch.bfloat16}
    assert found.gradient_dtypes == {torch.float32} and found.without_gradient == []
    is_divided = len(CASES[name].group_sizes) == 1
    assert found.row_tokens == (DIVIDED if is_divided else WHOLE)
    assert found.num_prefix_rows == is_divided
    (backend,) = found.backends
    assert backend == (name if name in ("flash3", "flash_attn", "reference") else "flash")
    kernels = found.first.counts
    assert kernels["aten.mm.default"] > 20
    assert {b for b, kernel in FORWARD.items() if kernels[kernel] > 3} == {backend} & {*FORWARD}


# The metrics, when all is launched.
METRICS = ("tolist", "megatron_pg/grpo/passes.py")
# Megatron's own: tokens of experts are counted on the device and divided on the host, by every
# layer for every row.
_DISPATCHER = ("Event.synchronize", "megatron/core/transformer/moe/token_dispatcher.py")
SYNCS: dict[str, dict[tuple[str, str], int]] = {
    "pp2_first": {},
    "retain_pp2_first": {},
    "experts": {_DISPATCHER: 4, METRICS: 1},
    "experts_deeper": {_DISPATCHER: 6, METRICS: 1},
    "experts_ep2": {_DISPATCHER: 4, METRICS: 1},
}


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_metrics_alone(seen, name: str) -> None:
    for record in (seen(name).first, seen(name).again):
        found = Counter((s.what, s.place.partition(":")[0]) for s in record.syncs)
        assert found == SYNCS.get(name, {METRICS: 1})


# In a first and in any later pass over two rows: what a pass reads goes in one copy per row, what
# attention and positions keep in three more. A prompt that stays is a row, too, of one pass less.
COPIES = dict.fromkeys(
    ["tp1", "tp2_sp_rank1", "cp2_rank1", "pp2_first", "pp2_last", "experts", "latent"], (8, 2)
)
# Each chunk of an interleaved stage gets its own.
COPIES |= {"pp2_vpp2_last": (10, 4)}
# Where states fork, one more a row; where they stay, one of every row that keeps or continues them.
COPIES |= {"linear": (10, 2), "linear_cp2_rank1": (10, 2), "linear_retain": (19, 3)}
COPIES |= {"mamba": (10, 2), "mamba_retain": (19, 3)}
COPIES |= {"flash3": (8, 2), "retain": (13, 3), "recompute": (14, 4), "window_retain": (27, 3)}


@pytest.mark.parametrize("name", COPIES)
def test_copies_to_the_device(seen, name: str) -> None:
    """Few, out of memory that is pinned, and none that the host waits for."""
    passes = seen(name).first, seen(name).again
    sent = [[copy for copy in record.copies if copy.is_to_device] for record in passes]
    assert tuple(map(len, sent)) == COPIES[name]
    assert all(copy.is_pinned and not copy.waits for copies in sent for copy in copies)
    assert all(sum(copy.num_bytes for copy in copies) < 60_000 for copies in sent)


def layers_between(seen, name: str, deeper: str) -> Counter[str]:
    """Kernels that more layers add, forward and backward, of one row."""
    few, many = seen(name).again.counts, seen(deeper).again.counts
    assert not few - many
    added = many - few
    # Two rows of the same tree.
    assert all(count % 2 == 0 for count in added.values()), added
    return Counter({kernel: count // 2 for kernel, count in added.items()})


# A layer's matrix products, for each forward two backward, and its kernels at the most. Megatron's
# own are more in some: products and activations of each of four experts and where tokens go, latent
# attention's rotation. All forward passes of compiled functions count as one kernel, their backward
# passes operator by operator.
LAYERS = {
    "tp1": ("deeper", 2, 12, 51),
    "cp2_rank0": ("cp2_deeper", 1, 12, 56),
    "experts": ("experts_deeper", 1, 33, 126),
    "latent": ("latent_deeper", 1, 21, 114),
    "mamba": ("mamba_deeper", 1, 6, 85),
}


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_of_a_layer(seen, name: str) -> None:
    """Forward and backward; attention and scans are two calls of a library, a depth each."""
    deeper, num_layers, num_products, most = LAYERS[name]
    added = layers_between(seen, name, deeper)
    per_layer = {kernel: count / num_layers for kernel, count in added.items()}
    assert sum(n for kernel, n in per_layer.items() if ".mm." in kernel) == num_products
    called = "mamba.chunk_scan_fwd" if name == "mamba" else FORWARD["flash"]
    assert per_layer[called] == 2
    assert sum(per_layer.values()) <= most, per_layer


def test_kernels_of_a_layer_of_linear_attention(seen) -> None:
    added = layers_between(seen, "linear", "linear_deeper")
    attention = layers_between(seen, "tp1", "deeper")
    layer = Counter({kernel: n - attention[kernel] // 2 for kernel, n in added.items()})
    # Projections are two of four products.
    assert layer["aten.mm.default"] == 12 and layer["fla.gated_delta_rule_fwd"] == 2
    assert layer[FORWARD["flash"]] == 0 and min(layer.values()) >= 0
    assert layer.total() <= 104, layer


def test_recomputed_layers_run_forward_twice(seen) -> None:
    once, twice = (seen(name).again.counts for name in ("tp1", "layer_recompute"))
    kernel = "aten._flash_attention_forward.default"
    assert once[kernel] == 8 and twice[kernel] == 16
    kernel = "aten._flash_attention_backward.default"
    assert once[kernel] == twice[kernel] == 8


def collectives(record: Record) -> list[str]:
    """Those of more than one rank: group, name, and the shape of what this rank gives."""
    return [
        f"{GROUPS[c.group]} {c.name} {'x'.join(map(str, c.shape))}".strip()
        for c in record.collectives
        if c.num_ranks > 1
    ]


GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "embedding",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "default_pg": "world",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tp+ep",
}


def row_under_tp(num_layers: int) -> list[str]:
    """Forward and backward, which gathers inputs once more for the gradients of weights."""
    gather, scatter = "tp all_gather 112x1x256", "tp reduce_scatter 224x1x256"
    forward = [scatter, *[gather, scatter] * 2 * num_layers]
    predict = ["tp all_gather 108x256", "tp all_reduce 128", "tp all_reduce 3x128"]
    backward = ["tp reduce_scatter 216x256", *[gather, gather, scatter] * 2 * num_layers, gather]
    return forward + predict + backward


def row_under_cp(num_layers: int, predictors: int) -> list[str]:
    """Queries, keys and values one way, what was attended to the other."""
    there, back = "cp all_to_all 2x112x256", "cp all_to_all 2x112x128"
    return predicted([there, back] * num_layers, predictors, [back, there] * num_layers)


def row_of_linear_layers_under_cp(predictors: int) -> list[str]:
    """As attention's; queries, keys, values and two numbers a head there, what was read back."""
    linear = "cp all_to_all 2x112x132", "cp all_to_all 2x112x64"
    attention = "cp all_to_all 2x112x256", "cp all_to_all 2x112x128"
    layers = [*linear, *attention]
    return predicted(layers, predictors, layers[::-1])


def predicted(forward: list[str], predictors: int, backward: list[str]) -> list[str]:
    """The rows of a rank that predict, of which each gets half; logprobs and entropies; back."""
    half = "cp all_to_all 64x256"
    edge = [f"cp all_to_all {predictors}x256", *["cp all_reduce 128"] * 2, half]
    return [*forward, *edge, *backward]


def exchanges(*moves: str) -> list[str]:
    """What goes to the other stage and comes from it, by its tokens; nobody asks for shapes.

    At the end of the pass both stages add up the gradient of the embedding.
    """
    lines = [f"pp {move}x1x256" for move in moves]
    return [*lines, "embedding all_reduce 512x256", "pp broadcast"]


def row_of_experts(num_layers: int) -> list[str]:
    """How many tokens go where; the tokens and their probabilities; the tokens back again."""
    there, back = ["ep all_to_all 448x256", "ep all_to_all 448"], "ep all_to_all 448x256"
    forward = ["expert tp+ep all_gather 4", *there, back]
    return [*forward * num_layers, *[back, *reversed(there)] * num_layers]


COLLECTIVES = {
    "tp1": [],
    # Each rank has its own tokens for the norms.
    "tp2_sp_rank0": [*row_under_tp(2) * 2, "tp all_reduce 1280"],
    "tp2_sp_rank1": [*row_under_tp(2) * 2, "tp all_reduce 1280"],
    # Gradients are summed as over replicas.
    "cp2_rank0": [*row_under_cp(2, 20) * 2, "dp all_reduce 1312000", "dp all_reduce"],
    "cp2_rank1": [*row_under_cp(2, 108) * 2, "dp all_reduce 1312000", "dp all_reduce"],
    "pp2_first": exchanges("send 224", "send 224", "recv 224", "recv 224"),
    "pp2_last": exchanges("recv 224", "send 224", "recv 224", "send 224"),
    "retain_pp2_first": exchanges(
        "send 95", "send 193", "send 193", "recv 193", "recv 193", "recv 95"
    ),
    "recompute_pp2_last": exchanges(
        "recv 95", "recv 193", "send 193", "recv 193", "send 193", "recv 95", "send 95"
    ),
    "linear_cp2_rank1": [
        *row_of_linear_layers_under_cp(108) * 2,
        "dp all_reduce 1249576",
        "dp all_reduce",
    ],
    # Two chunks of two rows: the later one's output comes while the other's is sent.
    "pp2_vpp2_last": [
        "pp recv 224x1x256",
        *["pp recv 224x1x256", "world send 224x1x256"] * 5,
        "world send 224x1x256",
        "embedding all_reduce 512x256",
        "pp broadcast",
    ],
    # All that experts do not divide is as under data parallelism.
    "experts_ep2": [*row_of_experts(2) * 2, "dp all_reduce 527616", "dp all_reduce"],
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_in_order(seen, name: str) -> None:
    assert collectives(seen(name).again) == COLLECTIVES[name]
