"""What verl can ask for and packed rows do not do is refused by name, all at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is installed in its own lane")

from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import McoreEngineConfig  # noqa: E402

from megatron_pg.adapters.verl import PrefixGroupedMegatronEngine  # noqa: E402
from megatron_pg.adapters.verl.packing import Samples  # noqa: E402
from megatron_pg.adapters.verl.rebound import rebound  # noqa: E402
from megatron_pg.adapters.verl.refusals import check_batch, check_engine  # noqa: E402
from megatron_pg.adapters.verl.settings import packing_config, read_settings  # noqa: E402
from megatron_pg.grpo import PrefixGroupConfig  # noqa: E402
from tests.adapters.verl.batches import make_batch, ragged, single_turn  # noqa: E402
from tests.mcore.harness import Case, make_config  # noqa: E402

pytestmark = pytest.mark.verl


def model_config(**changes: Any) -> SimpleNamespace:
    settings = dict(hf_config=SimpleNamespace(), mtp=SimpleNamespace(enable=False), lora={})
    return SimpleNamespace(**settings | changes)


def test_what_verl_sets_by_default_passes() -> None:
    check_engine(model_config(), McoreEngineConfig())
    check_engine(model_config(), McoreEngineConfig(context_parallel_size=2))


REFUSED = {
    "mtp.enable=True": (dict(mtp=SimpleNamespace(enable=True)), {}),
    "vision_config": (dict(hf_config=SimpleNamespace(vision_config={})), {}),
    "lora.rank=8": (dict(lora=dict(rank=8)), {}),
    "use_fused_kernels=True": ({}, dict(use_fused_kernels=True)),
    "use_remove_padding=False": ({}, dict(use_remove_padding=False)),
    "pad_to_length=True": ({}, dict(pad_to_length=True)),
    "dynamic_context_parallel=True": (
        {},
        dict(dynamic_context_parallel=True, max_seqlen_per_dp_cp_rank=8),
    ),
    "vanilla_mbridge=True": ({}, dict(vanilla_mbridge=True)),
    "use_megatron_fsdp=True": ({}, dict(use_megatron_fsdp=True)),
    "qat.enable=True": ({}, dict(qat=SimpleNamespace(enable=True))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_by_name(name: str) -> None:
    of_model, of_engine = REFUSED[name]
    with pytest.raises(NotImplementedError) as error:
        PrefixGroupedMegatronEngine(
            model_config=model_config(**of_model),
            engine_config=McoreEngineConfig(**of_engine),
            optimizer_config=None,
            checkpoint_config=None,
        )
    message = str(error.value)
    assert name in message and "asks for 1 thing(s)" in message
    assert "VERL_ENGINE_VENDOR" in message


def test_all_settings_are_refused_at_once() -> None:
    with pytest.raises(NotImplementedError, match=r"asks for 3 thing\(s\)"):
        check_engine(
            model_config(mtp=SimpleNamespace(enable=True)),
            McoreEngineConfig(pad_to_length=True, use_fused_kernels=True),
        )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(distillation_use_topk=True), "distillation_use_topk=True"),
        (dict(distillation_only=True), "distillation_only=True"),
        (dict(calculate_sum_pi_squared=True), "calculate_sum_pi_squared=True"),
        (dict(force_group_size=2), "force_group_size=2"),
    ],
)
def test_what_a_batch_asks_for_is_refused(changes: dict[str, Any], name: str) -> None:
    rows = ragged(0)
    check_batch(make_batch(rows, 8, 0), reads_samples_alone=False)
    with pytest.raises(NotImplementedError) as error:
        check_batch(make_batch(rows, 8, 0, **changes), reads_samples_alone=False)
    assert name in str(error.value)


def test_images_and_padding_are_refused() -> None:
    data = make_batch(ragged(0), 8, 0)
    tu.assign_non_tensor_stack(data, "multi_modal_inputs", [{}] * 8)
    check_batch(data, reads_samples_alone=True)
    images = [dict(pixel_values=torch.zeros(1, 2))] * 8
    tu.assign_non_tensor_stack(data, "multi_modal_inputs", images)
    data["input_ids"] = data["input_ids"].to_padded_tensor(0)
    with pytest.raises(NotImplementedError) as error:
        check_batch(data, reads_samples_alone=True)
    assert "multi_modal_inputs" in str(error.value) and "padding" in str(error.value)


def test_samples_that_have_no_prompt_are_refused() -> None:
    data = make_batch(single_turn("a", 5, [3, 4], 0), 2, 0)
    data["responses"] = data["input_ids"]
    with pytest.raises(ValueError, match="at least one token of prompt"):
        Samples.of(data, responses_only=True)


def test_settings_of_packing() -> None:
    def settings(**given: Any) -> Any:
        return McoreEngineConfig(override_mcore_model_config=dict(prefix_group=given))

    assert read_settings(settings(min_shared=4)).min_shared == 4
    assert read_settings(McoreEngineConfig()).prefix_resident == "auto"
    for name in ("min_share", "max_tokens_per_microbatch"):
        with pytest.raises(ValueError, match=f"prefix_group has {name}.*ppo_max_token_len_per_gpu"):
            read_settings(settings(**{name: 4}))
    nothing = McoreEngineConfig(override_mcore_model_config=dict(prefix_group=None))
    assert read_settings(nothing) == PrefixGroupConfig()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(prefix_resident="sometimes"), "prefix_resident='sometimes' must be one of auto, "),
        (dict(logprob_chunk_tokens=0), "logprob_chunk_tokens=0 must be a whole number from 1"),
        (dict(min_shared=True), "min_shared=True must be a whole number from 1"),
        (dict(attention_backend=1), "attention_backend=1 must be a name"),
    ],
)
def test_values_of_settings_are_refused_at_once(given: dict[str, Any], told: str) -> None:
    engine = McoreEngineConfig(override_mcore_model_config=dict(prefix_group=given))
    with pytest.raises(ValueError, match=f"prefix_group.{told}"):
        read_settings(engine)


@pytest.mark.parametrize(("asked", "choice"), [("auto", "never"), ("always", "always")])
def test_prompts_are_divided_where_parameters_are_gathered_aside(asked: Any, choice: str) -> None:
    config, chunk = make_config(Case()), SimpleNamespace(vocab_size=64)
    settings = PrefixGroupConfig(prefix_resident=asked)
    assert packing_config(settings, config, [chunk], 64).residency.choice == asked
    config.param_sync_func = print
    packing = packing_config(settings, config, [chunk], 64)
    assert packing.residency.choice == choice and packing.max_tokens == 64


class Host:
    """Something whose method calls functions of its module."""

    def method(self, x: int, *, twice: int = 2) -> int:
        return helper(x) * twice


def helper(x: int) -> int:
    return x


def test_only_the_call_sees_other_functions() -> None:
    host = Host()
    assert rebound(host.method, helper=lambda x: x + 10)(1) == 22
    assert host.method(1) == 2 and helper(1) == 1
    with pytest.raises(NotImplementedError, match="does not call other"):
        rebound(host.method, other=helper)
