"""The tables of what is supported say what the suites compare, no more and no less."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from tests import support  # noqa: E402
from tests.utils import ROOT  # noqa: E402

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize(
    ("table", "readme"),
    [
        (support.layers_table, "README.md"),
        (support.ordinary_table, "megatron_pg/mcore/sharing/README.md"),
        (support.families_table, "megatron_pg/checkpoint/README.md"),
    ],
)
def test_readme_has_the_table(table: object, readme: str) -> None:
    assert callable(table)
    assert table() in (ROOT / readme).read_text(), "run python -m tests.support"
