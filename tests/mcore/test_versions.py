"""Versions of Megatron-Core: one list, told the same everywhere, and what lies beside it."""

from __future__ import annotations

import re
from pathlib import Path

import megatron.core
import pytest
from packaging.requirements import Requirement

from megatron_pg.mcore import TESTED_VERSIONS
from megatron_pg.mcore.versions import check_version
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

ROOT = Path(__file__).parents[2]


def imported_version() -> str:
    """Without the commit that one has which lies in a git checkout."""
    return megatron.core.__version__.partition("+")[0]


def test_this_one_is_tested(ranks: Pool) -> None:
    assert imported_version() in TESTED_VERSIONS
    assert ranks.run(1, imported_version) == [imported_version()]


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_tested_versions_pass_without_a_word(version: str, recwarn) -> None:
    check_version(version)
    assert not recwarn.list


def test_older_ones_are_refused() -> None:
    with pytest.raises(ImportError, match=r"megatron-core 0\.15\.3 is older than 0\.16\.1"):
        check_version("0.15.3")


@pytest.mark.parametrize("version", ["0.20.0rc0", "1.0.0"])
def test_newer_ones_are_warned_of(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"megatron-core {version} is newer than 0\.19\.2"):
        check_version(version)


def test_the_extra_installs_them_and_no_others() -> None:
    (needed,) = re.findall(r'"(megatron-core[^"]*)"', (ROOT / "setup.py").read_text())
    specifier = Requirement(needed).specifier
    assert all(specifier.contains(version) for version in TESTED_VERSIONS)
    assert not specifier.contains("0.15.3") and not specifier.contains("0.20.0")


@pytest.mark.parametrize("version", TESTED_VERSIONS)
@pytest.mark.parametrize("file", ["README.md", "tests/run.sh"])
def test_readers_are_told_of_each(file: str, version: str) -> None:
    text = (ROOT / file).read_text()
    assert version in text or f"megatron-core {version.rpartition('.')[0]}" in text
