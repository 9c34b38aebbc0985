"""What Megatron's optimizers miss when their Adam is torch's, or has made no step yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def loading_torch_adam(optimizer: Any) -> Iterator[None]:
    """Load a checkpoint into a fresh ``optimizer`` inside the block; fused Adams pass unchanged.

    Megatron-Core is written for Adams with one step count. Torch's, which it takes where neither
    Transformer Engine nor Apex is installed, makes its state at its first step only, although the
    step count is read before loading; its step counts are no part of what is loaded per
    parameter, and none is saved before the first step; and loading leaves one count that all
    parameters share and that each would advance.

    Args:
        optimizer: Megatron's, as from ``get_megatron_optimizer``.
    """
    parts = [p for p in optimizer.chained_optimizers if isinstance(p.optimizer, torch.optim.AdamW)]
    with ExitStack() as stack:
        for part in parts:
            _make_state(part.optimizer)
            load = _with_first_step(part.optimizer)
            stack.enter_context(mock.patch.object(part.optimizer, "load_state_dict", load))
            name = "_set_main_param_and_optimizer_states"
            if hasattr(part, name):
                stack.enter_context(mock.patch.object(part, name, _with_step(part, name)))
        yield
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def make_first_state(optimizer: Any) -> None:
    """Zeros for an ``optimizer`` that has made no step yet, which its Adam makes at the first one.

    A checkpoint without them could not be loaded: who loads it asks for them.

    Args:
        optimizer: Megatron's, as from ``get_megatron_optimizer``.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if isinstance(adam, torch.optim.AdamW):
            _make_state(adam)
        elif adam is not None and not adam.state:
            part.init_state_fn(adam, part.config)


def _make_state(adam: torch.optim.AdamW) -> None:
    """What torch's Adam makes at its first step."""
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        if not adam.state[parameter]:
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _with_first_step(adam: torch.optim.AdamW) -> Callable[[dict[str, Any]], None]:
    """``load_state_dict``, given a step count of 0 where nothing has been averaged yet."""
    original = adam.load_state_dict

    def load(state: dict[str, Any]) -> None:
        for own in state["state"].values():
            if "step" not in own and not own["exp_avg_sq"].any():
                own["step"] = torch.tensor(0.0)
        original(state)

    return load


def _with_step(part: Any, name: str) -> Callable[[Any, dict[str, Any]], None]:
    """The method ``name`` of ``part``, given the step count that was loaded before."""
    original = getattr(part, name)

    def set_states(model_param: Any, tensors: dict[str, Any]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][place]
        original(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

    return set_states
