"""slime, and what derives from it: actors encode once what the samples of a microbatch share.

With this folder on PYTHONPATH: --custom-model-provider-path slime_provider.model_provider
Then raise --max-tokens-per-gpu by the reuse ratio, of which count_shared_tokens(model) tells.
"""

from megatron.training import get_args

from megatron_pg.mcore import PrefixSharingGPTModel, gpt_builder


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> PrefixSharingGPTModel:
    """The model of slime's own arguments, its layers wrapped."""
    return gpt_builder(get_args(), pre_process, post_process, vp_stage)
