"""Files that load without code being run, and hold what no program can work on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_pg.checkpoint import (
    TorchDistReader,
    hf_to_megatron,
    inspect_checkpoint,
    megatron_to_hf,
    open_weights,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.arguments import make_megatron_args
from megatron_pg.checkpoint.folders.torch_dist.shards import TorchDistShards
from tests.checkpoint.folders import make_config, make_weights, write_folder
from tests.checkpoint.poison import replace_records, serialised

pytestmark = pytest.mark.megatron

LOOP: list[Any] = []
LOOP.append(LOOP)
# Forty lists; written out 2**40 values.
DOUBLED: list[Any] = []
for _ in range(40):
    DOUBLED = [DOUBLED, DOUBLED]
TWO = torch.tensor([1, 2])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf/`` and ``megatron/release/``, which has no configuration and no manifest."""
    root = tmp_path_factory.mktemp("loaded")
    config = make_config("LlamaForCausalLM")
    write_folder(root / "hf", config, make_weights(config))
    hf_to_megatron(root / "hf", root / "megatron")
    shutil.rmtree(root / "megatron" / "huggingface")
    (root / "megatron" / "release" / "manifest.json").unlink()
    return root


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "megatron" / "release", tmp_path / "release"))


def edit_common(folder: Path, edit: Callable[[dict[Any, Any]], object]) -> None:
    common = torch.load(folder / "common.pt")
    edit(common)
    torch.save(common, folder / "common.pt")


def in_args(**values: Any) -> Callable[[dict[Any, Any]], object]:
    return lambda common: vars(common["args"]).update(values)


COMMONS: dict[str, tuple[Callable[[dict[Any, Any]], object], str]] = {
    "a number as key": (lambda c: c.update({5: 1}), "common.pt"),
    "a loop": (lambda c: c.update(content_metadata=LOOP), "common.pt"),
    "a bomb": (lambda c: c.update(content_metadata=DOUBLED), "common.pt"),
    "a tensor without values": (lambda c: c.update(x=TWO.to("meta")), "common.pt"),
    "a sparse tensor": (lambda c: c.update(x=TWO.to_sparse()), "common.pt"),
    "a number as argument": (lambda c: vars(c["args"]).update({5: 1}), "common.pt"),
    "a loop as argument": (in_args(num_layers=LOOP), "common.pt"),
    "a tensor as switch": (in_args(group_query_attention=TWO), "group_query_attention"),
    "a tensor as factor": (in_args(moe_router_topk_scaling_factor=TWO), "topk_scaling_factor"),
    "layers without end": (in_args(num_layers=10**9), "num_layers"),
    "experts without end": (in_args(num_experts=10**9, moe_router_topk=1), "num_experts"),
}


@pytest.mark.parametrize("name", COMMONS)
def test_common_state_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    edit, named = COMMONS[name]
    edit_common(folder, edit)
    with pytest.raises(ValueError, match=named):
        megatron_to_hf(folder, tmp_path / "hf")
    with pytest.raises(ValueError, match=named):
        reshard_checkpoint(folder, tmp_path / "other", tp_size=1, pp_size=1)
    inspect_checkpoint(folder)


def test_no_arguments_can_be_inspected(folder: Path) -> None:
    edit_common(folder, lambda common: common.update(args=None))
    assert inspect_checkpoint(folder).kind == "torch_dist"


@pytest.mark.parametrize("value", ["x", -7, 0, 0.5, True, 2**50])
def test_divisor_of_the_vocabulary(folder: Path, tmp_path: Path, value: Any) -> None:
    edit_common(folder, in_args(make_vocab_size_divisible_by=value))
    with pytest.raises(ValueError, match="make_vocab_size_divisible_by"):
        reshard_checkpoint(folder, tmp_path / "other", tp_size=1, pp_size=1)


EXTRA_STATES = {"loop": LOOP, "bomb": DOUBLED, "meta": torch.empty(0, device="meta")}


@pytest.mark.parametrize("name", EXTRA_STATES)
def test_extra_state_is_refused(folder: Path, name: str) -> None:
    state = serialised([EXTRA_STATES[name]])
    replace_records(folder, lambda key, _, record: state if "_extra_state" in key else record)
    with pytest.raises(ValueError, match=r"distcp: .*_extra_state"):
        open_weights(folder)


LEGACY: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "no values": lambda model: {name: tensor.to("meta") for name, tensor in model.items()},
    "sparse": lambda model: {name: tensor.to_sparse() for name, tensor in model.items()},
    "numbered": lambda model: model | {5: TWO},
    "list": lambda model: [model],
    "nothing": lambda model: None,
    "loop": lambda model: model | {"x._extra_state": LOOP},
}


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_model_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    shards = TorchDistShards(source / "megatron" / "release", trust_pickle=False)
    model = read_hf_config(source / "hf")
    rows = shards.shape("embedding.word_embeddings.weight")[0]
    names = model.weight_table(rows).megatron_names()
    rank = dict(args=make_megatron_args(model), iteration=0)
    tensors = {name: shards.read(name)[0] for name in names}
    file = tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save(rank | {"model": tensors}, file)
    open_weights(tmp_path / "release")
    for spoiled in (rank | {"model": LEGACY[name](tensors)}, [rank]):
        torch.save(spoiled, file)
        with pytest.raises(ValueError, match="model_optim_rng.pt"):
            open_weights(tmp_path / "release")


def test_description_spoils_no_class(folder: Path) -> None:
    """The instruction that fills an object sets attributes of classes and functions too."""

    def named(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    # (None, {"is_file": False})
    state = b"N}\x8c\x07is_file\x89s\x86b0"
    targets = (
        ("pathlib", "PosixPath"),
        (dcp.__name__, "Metadata"),
        (dcp.__name__, "TensorStorageMetadata"),
        (dcp.__name__, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
    )
    path = folder / ".metadata"
    pickled = path.read_bytes()
    assert pickled[:2] == b"\x80\x04"
    attack = b"".join(named(*target) + state for target in targets)
    path.write_bytes(pickled[:2] + attack + pickled[2:])
    reader = TorchDistReader(folder)
    assert Path(folder).is_dir() and Path(path).is_file()
    for holder in (dcp.Metadata, dcp.TensorStorageMetadata, dcp._MEM_FORMAT_ENCODING):
        assert not hasattr(holder, "is_file")
    assert not hasattr(torch.serialization._get_layout, "is_file")
    assert type(next(iter(reader.tensors.values())).shape) is tuple


def test_many_parts_are_compared_in_order(tmp_path: Path) -> None:
    """Every part is looked at where it lies, not at every edge of another."""
    num_parts, looked = 3000, 0

    class Offsets(tuple[int, ...]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(index)

    from megatron_pg.checkpoint.folders.torch_dist.metadata import _first_flaw

    boxes = [(Offsets((i,)), (1,)) for i in range(num_parts)]
    assert _first_flaw(boxes, (num_parts,)) is None
    assert looked < 20 * num_parts
    del boxes[1234]
    assert _first_flaw(boxes, (num_parts,)) == ((1234,), 0)
