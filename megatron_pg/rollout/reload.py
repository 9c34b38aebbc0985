"""How inference servers are told to read new weights from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import JsonClient
from .retry import RetryPolicy


@dataclass(frozen=True, kw_only=True)
class ReloadCall:
    """One POST of a reload.

    Attributes:
        path: of the server, with leading slash.
        body: JSON; ``{model_path}`` and ``{version}`` in its strings are replaced.
    """

    path: str
    body: Any


@dataclass(frozen=True, kw_only=True)
class ReloadPlan:
    """Everything a server needs to serve new weights.

    Attributes:
        calls: made in order, once each: a reload that failed is not tried again.
        is_model_path: later requests name the folder as their model.
    """

    calls: tuple[ReloadCall, ...]
    is_model_path: bool = False

    def run(self, client: JsonClient, folder: Path, version: int) -> None:
        """Make the calls.

        Raises:
            RolloutServerError: if one fails, or answers with an error or without success.
        """
        values = {"model_path": folder, "version": version}
        for call in self.calls:
            answer = client.post(
                call.path, _fill(call.body, values), retry=RetryPolicy(max_attempts=1)
            )
            if isinstance(answer, Mapping) and (
                answer.get("success", True) is not True or answer.get("error") is not None
            ):
                said = answer.get("message") or answer.get("error") or answer
                raise client.error(
                    call.path, 200, f"the server refused the weights in {folder}: {said}"
                )


RELOAD_PLANS: Mapping[str, ReloadPlan] = {
    # Start the server with VLLM_SERVER_DEV_MODE=1, which opens these paths.
    "vllm": ReloadPlan(
        calls=(
            ReloadCall(
                path="/collective_rpc",
                body={"method": "reload_weights", "kwargs": {"weights_path": "{model_path}"}},
            ),
            ReloadCall(path="/reset_prefix_cache", body={}),
        )
    ),
    # Flushes its prefix cache by itself.
    "sglang": ReloadPlan(
        calls=(ReloadCall(path="/update_weights_from_disk", body={"model_path": "{model_path}"}),)
    ),
    # Loads the folder that a request names.
    "transformers": ReloadPlan(calls=(ReloadCall(path="/reset", body={}),), is_model_path=True),
}


def _fill(template: Any, values: Mapping[str, Any]) -> Any:
    """A JSON value with ``{name}`` in its strings replaced, at any depth."""
    if isinstance(template, str):
        for name, value in values.items():
            template = template.replace("{" + name + "}", str(value))
        return template
    if isinstance(template, Mapping):
        return {key: _fill(value, values) for key, value in template.items()}
    if isinstance(template, Sequence):
        return [_fill(value, values) for value in template]
    return template


def remove_others(folder: Path) -> None:
    """Remove the folders ``version-*`` beside ``folder``."""
    for other in folder.parent.glob("version-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
