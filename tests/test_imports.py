"""The import arrows between packages, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.utils import ROOT

PACKAGE = ROOT / "megatron_pg"
BOTTOM = {"tree", "attention", "linear", "data", "loss", "parallel"}
MAY_IMPORT: dict[str, set[str]] = {
    "tree": set(),
    "attention": {"tree"},
    "linear": {"tree"},
    "data": {"tree"},
    "loss": set(),
    "parallel": {"tree"},
    "rollout": {"data"},
    "mcore": BOTTOM,
    "grpo": {"data", "loss", "mcore", "parallel", "tree"},
    "checkpoint": {"data", "mcore", "parallel"},
    "adapters": {"data", "grpo", "mcore", "parallel", "tree"},
    "train": BOTTOM | {"mcore", "grpo", "rollout", "checkpoint"},
}
# Rooms within a package: each may import those before it, and modules of a room only by its door.
ROOMS: dict[str, tuple[str, ...]] = {
    "data": (
        *("values", "json_text", "types", "checksum", "route_forms", "rows", "model", "routes"),
        *("reading", "cost", "shape", "planning", "roofline", "pack"),
    ),
    "checkpoint": (
        *("files", "new_folder", "table", "description", "families", "arguments", "folders"),
        *("load", "export", "one_rank", "sharded_state", "convert", "reshard", "verify"),
        *("inspect", "bridge"),
    ),
    "grpo": (
        *("settings", "replicas", "shape", "messages", "token_counts", "packing_config"),
        *("packing", "placement", "advantages", "batch", "replay", "staging", "passes", "offload"),
        *("trainable", "step", "reference"),
    ),
    "rollout": (
        *("values", "base", "named", "run_all", "retry", "ahead", "rewards", "prompts"),
        *("streams", "recorded"),
        *("transport", "client", "dialects", "answers", "answer_forms", "reload", "probe"),
        *("openai_server",),
    ),
    "mcore": (
        *("versions", "norm", "cpu", "config_fields", "refused_fields", "validate", "pipeline"),
        *("predictions", "decoder"),
        *(
            "routers",
            "resident",
            "row_rotary",
            "positioned",
            "params",
            "layers",
            "linear_specs",
            "spec",
            "local_specs",
            "te_specs",
            "model",
            "hybrid",
        ),
        *("chunks", "schedule", "sharing", "model_config", "builder", "generation"),
    ),
    "adapters": ("verl",),
    "train": (
        *("launcher", "lifetime", "config", "ranks", "model", "rollouts", "checkpoints", "metrics"),
        *("validation", "trainer", "run", "dry_run", "__main__"),
    ),
}
MEGATRON = {"mcore", "grpo", "checkpoint", "adapters", "train"}


def imports(path) -> list[tuple[str, list[str]]]:
    """Absolute names of what a module imports, with the names taken."""
    found = []
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.append((name, [alias.name for alias in node.names]))
    return found


def test_arrows() -> None:
    crossings = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1:
            continue
        package = parts[0]
        assert package in MAY_IMPORT, f"{package} has no place in the architecture"
        for name, taken in imports(path):
            if name.split(".")[0] == "megatron":
                assert package in MEGATRON, f"{path} imports {name}"
            if not name.startswith("megatron_pg"):
                continue
            target = name.split(".")[1:] or [taken[0]]
            if target[0] == package:
                continue
            crossings += 1
            assert target[0] in MAY_IMPORT[package], f"{path}: {package} may not import {target[0]}"
            assert len(target) == 1, f"{path} imports {name}; take it from {target[0]}'s __init__"
            assert not any(t.startswith("_") for t in taken), (
                f"{path} takes a private name: {taken}"
            )
    assert crossings > 5


def public_names(package: str) -> set[str]:
    """``__all__`` of a package; its rooms too, of the whole."""
    rooms = set(MAY_IMPORT) if package == "megatron_pg" else set()
    file = ROOT / package.replace(".", "/") / "__init__.py"
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return rooms | set(ast.literal_eval(node.value))
    raise AssertionError(f"{file} says no public names")


@pytest.mark.parametrize("folder", ["tools", "examples"])
def test_public_names_only(folder: str) -> None:
    """What stands outside of the package takes what a user may take."""
    taken_from: set[str] = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, taken in imports(path):
            if not name.startswith("megatron_pg"):
                continue
            taken_from.add(name)
            assert name.count(".") < 2, f"{path} imports {name}"
            assert set(taken) <= public_names(name), f"{path} takes {taken} of {name}"
    assert len(taken_from) > 2


def test_rooms() -> None:
    crossings = 0
    for package, rooms in ROOMS.items():
        folder = PACKAGE / package
        held = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert held - {"__init__", "__pycache__"} == set(rooms), "each has its place"
        for path in sorted(folder.rglob("*.py")):
            room = path.relative_to(folder).with_suffix("").parts[0]
            for name, _ in imports(path):
                target = name.removeprefix(f"megatron_pg.{package}.").split(".")
                if room == "__init__" or target[0] not in rooms or target[0] == room:
                    continue
                crossings += 1
                order = rooms.index(target[0]), rooms.index(room)
                assert order[0] < order[1], f"{path}: {room} may not import {target[0]}"
                assert len(target) == 1, f"{path} imports {name}; take it from the room's __init__"
    assert crossings > 50


def test_imports_without_megatron() -> None:
    """The Megatron-free half works where neither Megatron nor a GPU package is importable."""
    code = (
        "import sys\n"
        "for name in ('megatron', 'transformer_engine', 'flash_attn', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import megatron_pg, megatron_pg.data, megatron_pg.loss, megatron_pg.parallel\n"
        "import megatron_pg.linear, megatron_pg.rollout\n"
        "tree = megatron_pg.PrefixTree.from_group(2, [1])\n"
        "print(megatron_pg.pack_trees([tree]).total_tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "3", done.stderr
