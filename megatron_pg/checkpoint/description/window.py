"""Sliding windows: which layers have them, in config.json's words and in Megatron's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .layer_patterns import read_pattern

_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Attention to the last tokens alone.

    Attributes:
        size: tokens that a token sees, itself among them.
        layers: 1 for a layer with the window and 0 for one without, in model order.
    """

    size: int
    layers: tuple[int, ...]

    def in_megatron(self) -> dict[str, Any]:
        """What ``TransformerConfig`` and Megatron-LM's arguments call alike."""
        layers = None if all(self.layers) else list(self.layers)
        return dict(window_size=(self.size - 1, 0), window_attn_skip_freq=layers)


def make_window(size: int | None, layers: Sequence[int]) -> Window | None:
    """None where no layer has one."""
    return None if size is None or not any(layers) else Window(size=size, layers=tuple(layers))


class NoWindows:
    """A family without; a size that its file has all the same is refused, unless it is off."""

    def read(self, values: ConfigValues, num_layers: int) -> Window | None:
        """From a ``config.json``; what is wrong is left in ``values``."""
        values.flag("use_sliding_window")
        _check_layers(values, [0] * num_layers)
        if values.get("use_sliding_window", True):
            values.must("sliding_window", None)
        return None

    def config_json(self, window: Window | None, num_layers: int) -> dict[str, Any]:
        """Keys of a ``config.json``."""
        return {}

    def read_arguments(self, read: ArgumentValues, num_layers: int) -> Window | None:
        """From Megatron-LM's arguments, which are held against the model afterwards.

        Raises:
            ValueError: a window to the right, or a pattern of other layers.
        """
        return None


class WindowInEveryLayer(NoWindows):
    """Wherever a size is given.

    Args:
        switch: whether ``use_sliding_window`` turns it on; ignored otherwise.
    """

    def __init__(self, switch: bool = False) -> None:
        self.switch = switch

    def read(self, values: ConfigValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        is_on = values.flag("use_sliding_window") or not self.switch
        size = values.size("sliding_window", default=None)
        if self.switch and is_on:
            values.require("sliding_window")
        layers = [int(is_on and size is not None)] * num_layers
        _check_layers(values, layers)
        return make_window(size, layers)

    def config_json(self, window: Window | None, num_layers: int) -> dict[str, Any]:
        """See ``NoWindows``."""
        size = None if window is None else window.size
        switch = dict(use_sliding_window=size is not None) if self.switch else {}
        return dict(sliding_window=size) | switch

    def read_arguments(self, read: ArgumentValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        return make_window(_read_size(read), [1] * num_layers)


class WindowByLayer(NoWindows):
    """``layer_types`` names the layers with a window."""

    def read_arguments(self, read: ArgumentValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        size, layers = _read_size(read), read_pattern(read, "window_attn_skip_freq", num_layers)
        return make_window(size, layers or [1] * num_layers)


class WindowBySwitch(WindowByLayer):
    """``use_sliding_window``, and layers by ``layer_types`` or from ``max_window_layers`` on."""

    def read(self, values: ConfigValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        is_on = values.flag("use_sliding_window")
        # Some files have a window of 0 where the switch is off.
        is_none = not is_on and values.get("sliding_window") == 0
        size = None if is_none else values.size("sliding_window", default=None)
        if not is_on:
            _check_layers(values, [0] * num_layers)
            return None
        values.require("sliding_window")
        is_named = values.get("layer_types") is not None
        return make_window(size, (_read_layers if is_named else self.layers)(values, num_layers))

    def config_json(self, window: Window | None, num_layers: int) -> dict[str, Any]:
        """See ``NoWindows``."""
        if window is None:
            return dict(use_sliding_window=False)
        return dict(use_sliding_window=True, **_layers_json(window))

    def layers(self, values: ConfigValues, num_layers: int) -> list[int]:
        """Which have it, where none are named."""
        first = values.get("max_window_layers")
        if type(first) is not int or first < 0:
            values.problems.append(f"max_window_layers={first!r} must be a whole number from 0")
            return [0] * num_layers
        return [int(layer >= first) for layer in range(num_layers)]


class WindowByPeriod(WindowByLayer):
    """By ``layer_types``; without, every layer has one but each ``period``-th.

    Args:
        period: where the file names none.
        key: by which it names one.
    """

    def __init__(self, period: int, key: str | None = None) -> None:
        self.period, self.key = period, key

    def read(self, values: ConfigValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        size = values.size("sliding_window", default=None)
        period = self.period if self.key is None else values.size(self.key, default=self.period)
        layers = [int((layer + 1) % period != 0) for layer in range(num_layers)]
        if values.get("layer_types") is not None:
            layers = _read_layers(values, num_layers)
        if size is None and any(layers):
            values.problems.append("sliding_window is missing, and layers are named that have one")
        return make_window(size, layers)

    def config_json(self, window: Window | None, num_layers: int) -> dict[str, Any]:
        """See ``NoWindows``."""
        # transformers makes a mask for it, used or not.
        return _layers_json(window or Window(size=1, layers=(0,) * num_layers))


def _read_layers(values: ConfigValues, num_layers: int) -> list[int]:
    types = values.get("layer_types")
    if not isinstance(types, list) or len(types) != num_layers:
        values.problems.append(f"layer_types={types!r:.80} must name all {num_layers} layers")
        return [0] * num_layers
    for kind in types:
        if kind not in _KINDS:
            values.refused.append(f"layer_types with {kind!r:.40} (must be one of {_KINDS})")
            return [0] * num_layers
    return [_KINDS.index(kind) for kind in types]


def _layers_json(window: Window) -> dict[str, Any]:
    types = [_KINDS[layer] for layer in window.layers]
    return dict(sliding_window=window.size, layer_types=types)


def _check_layers(values: ConfigValues, layers: Sequence[int]) -> None:
    values.must("layer_types", None, [_KINDS[layer] for layer in layers])


def _read_size(read: ArgumentValues) -> int | None:
    size = read.get("window_size")
    if not size:
        return None
    ok = isinstance(size, list | tuple) and len(size) == 2 and all(type(x) is int for x in size)
    if not ok or size[0] < 0 or size[1] != 0:
        read.refuse("window_size", size, "(n, 0): the token itself and n before it")
    return int(size[0]) + 1


def window_arguments(window: Window | None) -> dict[str, Any]:
    """Megatron-LM's arguments, where there is none too."""
    off = dict(window_size=None, window_attn_skip_freq=None)
    return off if window is None else window.in_megatron()
