"""Ready specs for Megatron-LM's ``--spec megatron_pg.mcore.local_specs NAME``, local modules."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from .spec import with_prefix_grouped_attention

layernorm_spec = with_prefix_grouped_attention(get_gpt_layer_local_spec())
rmsnorm_spec = with_prefix_grouped_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
rmsnorm_qk_layernorm_spec = with_prefix_grouped_attention(
    get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
)
