"""Ready specs for Megatron-LM's ``--spec megatron_pg.mcore.te_specs NAME``, Transformer Engine."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from .spec import with_prefix_grouped_attention

spec = with_prefix_grouped_attention(get_gpt_layer_with_transformer_engine_spec())
qk_layernorm_spec = with_prefix_grouped_attention(
    get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
)
