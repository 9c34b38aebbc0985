"""Every new thing that CONTRIBUTING shows works as it is printed, and passes the test beside it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_pg.attention import ATTENTION_BACKENDS
from megatron_pg.loss import ADVANTAGE_ESTIMATORS, POLICY_LOSSES
from tests.utils import ROOT

pytest.importorskip("megatron.core")
pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')

from megatron_pg.checkpoint import FAMILIES  # noqa: E402
from tools.bench.registry import BENCHMARKS  # noqa: E402

TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
THINGS = {
    part.split("\n", 1)[0]: re.findall(r"```python\n# (\S+)\n(.*?)```", part, flags=re.DOTALL)
    for part in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
}
TESTS = [
    pytest.param(thing, name, id=f"{Path(file).stem}-{name}")
    for thing, ((file, _), (_, test)) in THINGS.items()
    for name in re.findall(r"^def (test_\w+)", test, flags=re.MULTILINE)
]
REGISTRIES: list[dict[str, Any]] = [
    ADVANTAGE_ESTIMATORS,
    ATTENTION_BACKENDS,
    BENCHMARKS,
    POLICY_LOSSES,
    FAMILIES,
]
MODULES = [file.removesuffix(".py").replace("/", ".") for (file, _), _ in THINGS.values()]


@pytest.fixture(autouse=True)
def _registries_and_modules_as_before() -> Iterator[None]:
    before = [dict(registry) for registry in REGISTRIES]
    modules = {name: sys.modules[name] for name in MODULES if name in sys.modules}
    yield
    for registry, content in zip(REGISTRIES, before):
        registry.clear()
        registry.update(content)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(modules)


def install(file: str, code: str, folder: Path) -> None:
    """Put a shown file where it belongs: on the path, or among the modules of its package."""
    path = folder / Path(file).name
    path.write_text(code)
    if "/" in file:
        name = file.removesuffix(".py").replace("/", ".")
        importlib.import_module(name.rpartition(".")[0])
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


@pytest.mark.parametrize(("thing", "name"), TESTS)
def test_a_new_thing_passes_its_test(
    thing: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file, code), (test_file, test) = THINGS[thing]
    if (ROOT / file).is_file():
        # The file of the package itself: shown as it is, and registered anew.
        assert code == (ROOT / file).read_text()
        FAMILIES.pop("MistralForCausalLM")
    monkeypatch.syspath_prepend(tmp_path)
    install(file, code, tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(test, test_file, "exec"), namespace)
    test_function = namespace[name]
    folder = tmp_path / "files"
    folder.mkdir()
    test_function(**dict.fromkeys(inspect.signature(test_function).parameters, folder))


def test_all_things_are_shown() -> None:
    assert list(THINGS) == [
        "A policy loss",
        "An advantage estimator",
        "A rollout source",
        "A reward",
        "Prompts",
        "A model family",
        "An attention backend",
        "A benchmark",
    ]
    assert len(TESTS) >= len(THINGS)
    assert TEXT.count("```python") == 2 * len(THINGS)
    rules = TEXT.split("## Rules of the house")[1].split("## ")[0]
    assert len(re.findall(r"^\d+\. ", rules, flags=re.MULTILINE)) == 15


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((\S+?)\)", TEXT))))
def test_what_is_linked_is_there(link: str) -> None:
    assert (ROOT / ".github" / link).is_file()
