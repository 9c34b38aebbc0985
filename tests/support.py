"""The READMEs' tables of what is supported: a mark where a case of the suites proves it.

``python -m tests.support`` prints them; ``tests/test_support.py`` compares them with the READMEs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_pg.checkpoint import FAMILIES as REGISTERED
from tests.checkpoint import test_sharded, tiny
from tests.grpo import test_router, test_routes
from tests.mcore import cases, test_sharing_model
from tests.mcore.harness import Case
from tests.mcore.router_steps import RouterCase
from tests.train import test_families

Judge = Callable[[Case], bool]


def _sets(*names: str) -> Judge:
    """Whether a configuration sets one of these to something that is not off."""
    off: tuple[object, ...] = (None, False, 0, 0.0, "vanilla")
    return lambda case: any(case.config.get(name) not in off for name in names)


_has_experts, _is_latent = _sets("num_moe_experts"), _sets("multi_latent_attention")
_has_kinds = _sets("window_size", "softmax_type")


def _is_linear(case: Case) -> bool:
    return _sets("experimental_attention_variant")(case) or "G" in (case.pattern or "")


# What layers are, and which case has them.
LAYERS: dict[str, Judge] = {
    "MHA, GQA, MQA; qk-layernorm, biases, output gate, any `softmax_scale`": lambda case: (
        not (_has_experts(case) or _is_latent(case) or _has_kinds(case) or _is_linear(case))
    ),
    "latent attention (MLA), q-lora or not, RoPE or YaRN": _is_latent,
    "sliding window, in any pattern of layers": _sets("window_size"),
    "sinks: off-by-one, learnable": _sets("softmax_type"),
    "Gated DeltaNet (linear attention), in GPT and hybrids": _is_linear,
    "Mamba-2, in hybrids": lambda case: "M" in (case.pattern or ""),
    "dropless experts, softmax or sigmoid, groups, shared experts": _has_experts,
    "aux and seq-aux loss": _sets("moe_aux_loss_coeff"),
    "z-loss": _sets("moe_z_loss_coeff"),
    "expert bias, constant or updated": _sets("moe_router_enable_expert_bias"),
    "replayed routes": lambda case: isinstance(case, RouterCase) and case.replay,
}
# What they run under.
AXES: dict[str, Judge] = {
    "tp": lambda case: case.tp > 1,
    "sp": lambda case: case.sp,
    "pp": lambda case: case.pp > 1,
    "vpp": lambda case: case.vpp is not None,
    "cp": lambda case: case.cp > 1,
    "ep": lambda case: case.ep > 1,
    "etp": lambda case: case.ep > 1 and case.etp is not None,
    "recompute": _sets("recompute_granularity"),
}


def _compared() -> list[tuple[Case, bool]]:
    """Every case that is compared with samples written out, and whether its prompts stay."""
    newer = [case for _, case in cases.NEWER.values()]
    whole = [*cases.EQUIVALENCE.values(), *newer, *cases.HYBRID.values(), *cases.ROUTERS.values()]
    found = [(case, False) for case in whole]
    found += [(case, True) for case in cases.SCHEDULE.values()]
    stays = {"never": False, "always": True}
    found += [(case, stays[s.prefix_resident]) for case, s in test_router.CASES.values()]
    for name, layout in test_routes.LAYOUTS.items():
        stay = test_routes.SETTINGS[name].prefix_resident == "always"
        settings = layout | dict(config=cases.MOE["config"] | layout.get("config", {}))
        found.append((RouterCase(replay=True, **settings), stay))
    return found


def layers_table() -> str:
    """Markdown: kinds of layers, and what a step of them is compared under."""
    rows = []
    for words, has in LAYERS.items():
        stays = [stay for case, stay in _compared() if has(case)]
        marks = _axes([case for case, _ in _compared() if has(case)])
        rows.append([words, *map(_mark, [*marks, any(stays)])])
    return "\n".join(_markdown(["layers", *AXES, "resident prompts"], rows))


def ordinary_table() -> str:
    """Markdown: the same of the transparent model, on rows as trainers hand them over."""
    found = [variant.case for variant in test_sharing_model.VARIANTS.values()]
    proven = {words: [case for case in found if has(case)] for words, has in LAYERS.items()}
    rows = [[words, *map(_mark, _axes(own))] for words, own in proven.items() if own]
    return "\n".join(_markdown(["layers", *AXES], rows))


def _axes(compared: list[Case]) -> list[bool]:
    return [any(map(axis, compared)) for axis in AXES.values()]


def families_table() -> str:
    """Markdown: architectures, and what is compared with transformers."""
    columns = test_sharded.LAYOUTS.values()
    converted = {name for names, _, _ in columns for name in names}
    logits = {name for _, names, _ in columns for name in names}
    rows = []
    for architecture in sorted(REGISTERED):
        models = {n for n, f in tiny.FAMILIES.items() if f"{f.name}ForCausalLM" == architecture}
        marks = models <= converted, models <= logits, bool(models & {*test_families.TRAINED})
        rows.append([f"`{architecture}`", *map(_mark, marks)])
    head = ["architecture", "there and back, bit by bit", "logprobs", "five GRPO steps"]
    return "\n".join(_markdown(head, rows))


def _mark(is_proven: bool) -> str:
    return "✓" if is_proven else ""


def _markdown(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    print(layers_table(), ordinary_table(), families_table(), sep="\n\n")
