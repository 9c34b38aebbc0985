"""How stages come by their layers, read off Megatron's configurations."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import pytest

from megatron_pg.parallel import PipelineSplit


def test_nothing_said_is_even() -> None:
    assert PipelineSplit.from_config(Namespace()) == PipelineSplit()
    assert PipelineSplit().is_even and PipelineSplit().settings() == {}
    counted = PipelineSplit(account_for_loss_in_pipeline_split=True)
    assert not counted.is_even
    assert counted.settings() == {"account_for_loss_in_pipeline_split": True}
    assert PipelineSplit.from_config(Namespace(**asdict(counted))) == counted


@pytest.mark.megatron
def test_the_layout_that_megatron_makes_of_a_text_is_the_text() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.transformer_config import TransformerConfig

    split = PipelineSplit(pipeline_model_parallel_layout="Et|tttL")
    config = TransformerConfig(
        num_layers=4,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=2,
        pipeline_dtype=float,
        **split.settings(),
    )
    assert not isinstance(config.pipeline_model_parallel_layout, str)
    assert PipelineSplit.from_config(config) == split
    with pytest.raises(AttributeError):
        split.num_layers_in_first_pipeline_stage = 2  # type: ignore[misc]
