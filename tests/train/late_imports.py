"""What a run imports late: with this module it is there before ranks are forked, once for all."""

from importlib import import_module

for _name in (
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "megatron.core.dist_checkpointing.strategies.torch",
    "omegaconf",
    "rich.console",
    "rich.table",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
):
    import_module(_name)
