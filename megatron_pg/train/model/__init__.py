"""The model of a run: planned from the configuration, checked, built, loaded, wrapped."""

from .building import (
    TrainedModel,
    build_reference,
    build_trained_model,
    training_configs,
    validate_weights,
)
from .plan import ModelPlan, Origin, check_attention, plan_model, validate_trainable

__all__ = [
    "ModelPlan",
    "Origin",
    "TrainedModel",
    "build_reference",
    "build_trained_model",
    "check_attention",
    "plan_model",
    "training_configs",
    "validate_trainable",
    "validate_weights",
]
