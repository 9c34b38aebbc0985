"""In 16 bits packed rows err as the stock model does on written-out samples, router and all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.mcore import cases, harness
from tests.mcore.router_steps import (
    RouterCase,
    Side,
    make_router_rows,
    packed_batches,
    packed_step,
    relative,
    replaying_step,
    stock_batches,
)
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

# What is balanced is the router's own choice, whose jumps would hide how all else errs.
LIGHT: Any = dict(cases.AUX, moe_aux_loss_coeff=0.03)
STATISTICS: Any = (LIGHT, cases.Z, cases.BIAS, dict(moe_router_dtype="fp32"))
WINDOW = cases.window(3, softmax_type="learnable", window_attn_skip_freq=2)["config"]


def case_of(*parts: dict[str, Any], spec: dict[str, Any] | None = None, **layout: Any) -> Any:
    """Samples of one length with given routes: a choice of experts jumps with the last bit."""
    own = dict(equal=True, replay=True, dtype=torch.bfloat16, **layout)
    case = cases.router(*STATISTICS, dict(init_method_std=0.1), *parts, **own)
    return replace(case, spec=case.spec | (spec or {}))


CASES = {
    "window": case_of(WINDOW),
    "window_latent_full": case_of(
        WINDOW,
        cases.LATENT["config"],
        cases.FULL_RECOMPUTE,
        spec=cases.LATENT["spec"],
        position_embedding_type="rope",
    ),
}


def errors(case: RouterCase) -> dict[str, tuple[float, float]]:
    """Of every gradient: relative errors of the stock model in 16 bits, and of ours."""
    with harness.on_cpu():
        harness.initialize(case)
        wide = replace(case, dtype=torch.float64)
        rows = [make_router_rows(case, i) for i in range(2)]
        control, ours = Side(case, packed=False), Side(case, packed=True)
        truth = Side(wide, packed=False)
        ours.start_like(control)
        for exact, rounded in zip(truth.chunks, control.chunks):
            exact.load_state_dict(rounded.state_dict())
        want = truth.step(partial(replaying_step, wide, rows), written_out(wide, rows))
        theirs = control.step(partial(replaying_step, case, rows), written_out(case, rows))
        got = ours.step(packed_step, packed_batches(case, rows))
        counts = [name for name in want if name.startswith("count")]
        assert counts and all(torch.equal(got[name], want[name]) for name in counts)
        names = [name for name in want if name.startswith("grad")]
        assert all(want[name].any() for name in names)
        return {n: (relative(theirs[n], want[n]), relative(got[n], want[n])) for n in names}


def written_out(case: RouterCase, rows: list[harness.Rows]) -> list[Any]:
    return list(enumerate(stock_batches(case, rows)))


@pytest.mark.parametrize("name", CASES)
def test_gradients_err_as_the_stock_models_do(ranks: Pool, name: str) -> None:
    (found,) = ranks.run(1, errors, CASES[name])
    assert any("softmax_offset" in name for name in found)
    assert ("latent" in name) == any("kv_up_proj" in name for name in found)
    for name, (control, own) in found.items():
        assert 1e-3 < control < 0.05, name
        # The offsets of four heads are few numbers to err in.
        assert own <= (3 if "softmax_offset" in name else 2) * control, (name, own, control)
    controls, own = (sum(x[i] for x in found.values()) for i in (0, 1))
    assert own < 1.3 * controls
