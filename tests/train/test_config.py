"""What a configuration file may say, and what every mistake is answered with."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

pytest.importorskip("megatron.core")

from megatron_pg.loss import PolicyLossConfig  # noqa: E402
from megatron_pg.train import DryRun, TrainConfig, dry_run, load_config  # noqa: E402
from megatron_pg.train.config import ModelConfig, ParallelConfig  # noqa: E402
from megatron_pg.train.config.file import config_dict  # noqa: E402
from megatron_pg.train.model import plan as model_plan  # noqa: E402
from megatron_pg.train.rollouts.tokenizer import load_tokenizer  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, save_hf  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.utils import ROOT  # noqa: E402

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
FROM_SCRATCH = {
    "vocab_size": tiny.VOCAB,
    "transformer": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4},
}
FROM_SERVER = ("rollout.source=server", "rollout.files=[]", "rollout.server.reload=vllm")


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return tiny.run_sections(tmp_path)


def load(folder: Path, sections: dict[str, Any], *overrides: str) -> TrainConfig:
    return load_config(tiny.write_config(folder / "config.yaml", sections), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Unknown keys at every level.
        (["modle.hf=x"], "modle is unknown; did you mean 'model'?"),
        (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather is not offered"),
        (["parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap is not offered"),
        (["run.num_step=3"], "run.num_step is unknown; did you mean 'num_steps'?"),
        (["rollout.task.nmae=x"], "rollout.task.nmae is unknown; did you mean 'name'?"),
        (
            ["algorithm.policy.clip_ratio_hi=1"],
            "algorithm.policy.clip_ratio_hi is unknown; did you mean 'clip_ratio_high'?",
        ),
        (["rollout.server.base_ulr=x"], "did you mean 'base_url'?"),
        # Types.
        (["run.num_steps=ten"], "run.num_steps='ten' must be an integer"),
        (["run.num_steps=2.5"], "run.num_steps=2.5 must be an integer"),
        (["run.load=1"], "run.load=1 must be true or false"),
        (["optimizer.lr=fast"], "optimizer.lr='fast' must be a number"),
        (["optimizer.lr=true"], "optimizer.lr=True must be a number"),
        (["rollout.files=a.jsonl"], "rollout.files='a.jsonl' must be a list of text"),
        (["rollout.files=[1]"], "rollout.files=[1] must be a list of text"),
        (["rollout.reward_key=1"], "rollout.reward_key=1 must be text or a list of text"),
        (["rollout.group_across_files=1"], "rollout.group_across_files=1 must be true or false"),
        (["model.transformer=3"], "model.transformer=3 must be a mapping"),
        (["model.hf=3"], "model.hf=3 must be text or null"),
        (["run.out=~/runs"], "run.out='~/runs' begins with ~, which only a shell"),
        (["rollout.server.export_dir=~/a"], "export_dir='~/a' begins with ~, which"),
        (["rollout.source=file"], "must be one of recorded, model, server, module:name"),
        (["rollout.task=3"], "rollout.task must be a mapping, got 3"),
        # Ranges.
        (["run.num_steps=0"], "run.num_steps=0 must be at least 1"),
        (["algorithm.ppo_epochs=0"], "algorithm.ppo_epochs=0 must be at least 1"),
        (["optimizer.lr=-1e-3"], "optimizer.lr=-0.001 must be at least 0"),
        (["optimizer.lr=.nan"], "optimizer.lr=nan must be finite"),
        ([f"run.seed={2**53 + 1}"], "run.seed must be at most 2**53 (9007199254740992)"),
        ([f"run.num_steps={'9' * 400}"], "run.num_steps must be at most 2**53"),
        ([f"run.seed=-{'9' * 400}"], "999 must be at least 0"),
        (["optimizer.lr=.inf"], "optimizer.lr=inf must be finite and at least 0"),
        (["optimizer.adam_eps=.inf"], "optimizer.adam_eps=inf must be finite and above 0"),
        (["optimizer.adam_beta2=1"], "optimizer.adam_beta2=1.0 must be below 1"),
        (["optimizer.min_lr=1"], "optimizer.min_lr=1 must not exceed optimizer.lr=0.001"),
        (["rollout.temperature=0"], "rollout.temperature=0.0 must be above 0"),
        (["rollout.top_p=1.5"], "rollout.top_p=1.5 must be at most 1"),
        (["rollout.task.held_out_share=.nan"], "held_out_share=nan must lie in [0.01, 0.99]"),
        (["algorithm.policy.clip_ratio_high=.inf"], "clip_ratio_high"),
        (["rollout.num_generations=0"], "rollout.num_generations=0 must be at least 1"),
        (["run.keep_checkpoints=0"], "run.keep_checkpoints=0 must be at least 1"),
        # Names that other packages own.
        (["algorithm.adv_estimator=gpro"], "did you mean 'grpo'?"),
        (["algorithm.loss_agg_mode=token_mean"], "did you mean 'token-mean'?"),
        (["algorithm.kl_penalty=k9"], "algorithm.kl_penalty='k9' must be one of k1"),
        (["algorithm.policy.kl_loss_type=k9"], "kl_loss_type='k9' must be one of"),
        (["algorithm.policy.policy_loss=ppo"], "policy_loss='ppo' must be one of"),
        (["algorithm.policy.importance_mode=tis"], "importance mode='tis' must be one of"),
        (["prefix_group.attention_backend=flahs"], "did you mean 'flash"),
        (["optimizer.optimizer=lion"], "must be one of 'adam'"),
        (["parallel.cp_comm_type=p2p"], "parallel.cp_comm_type='p2p' must be one of 'a2a'"),
        (["optimizer.lr_decay_style=step"], "must be one of 'constant', 'linear'"),
        (["model.position_embedding_type=alibi"], "must be one of 'rope'"),
        # Combinations.
        (["algorithm.std_floor=0.1", "algorithm.adv_estimator=rloo"], "std_floor=0.1 needs"),
        (
            ["algorithm.norm_adv_by_std_in_grpo=false", "algorithm.adv_estimator=rloo"],
            "norm_adv_by_std_in_grpo=false needs algorithm.adv_estimator=grpo",
        ),
        (["algorithm.loss_scale_factor=3"], "do not belong together"),
        (["algorithm.loss_agg_mode=seq-mean-token-sum-norm"], "do not belong together"),
        (["algorithm.num_minibatches=6"], "must not exceed run.groups_per_step=5"),
        (["algorithm.overlong_buffer_len=11"], "must not exceed rollout.max_response_tokens=10"),
        (["algorithm.ref_hf=x"], "algorithm.ref_hf would be ignored"),
        (["rollout.files=[]"], "rollout.files is empty"),
        (["rollout.reward=a:b"], "rollout.reward='a:b' would be ignored"),
        (["run.eval_prompts=2"], "run.eval_prompts=2 needs a rollout.source that samples"),
        (["run.eval_prompts=some"], "run.eval_prompts='some' must be an integer or one of 'all'"),
        (["run.eval_prompts=-1"], "run.eval_prompts=-1 must be at least 0"),
        (["run.eval_prompts=all"], "run.eval_prompts=all needs a rollout.source that samples"),
        (["run.eval_interval=2"], "run.eval_interval=2 needs run.eval_prompts"),
        (["run.eval_interval=-2"], "run.eval_interval=-2 must be at least 0"),
        (["run.keep_best=true"], "run.keep_best=true needs run.eval_interval"),
        (["run.log_generations_interval=3"], "log_generations_interval=3 would write what the rec"),
        (["run.log_generations_interval=-1"], "log_generations_interval=-1 must be at least 0"),
        (["run.rollout_ahead=true"], "with rollout.source='recorded': recorded groups are there"),
        (
            ["run.rollout_ahead=true", "rollout.source=model", "rollout.files=[]"],
            "with rollout.source='model': the model cannot sample while it is trained",
        ),
        (
            [*FROM_SERVER, "run.rollout_ahead=true"],
            "only importance weights make up for: set algorithm.policy.importance_mode",
        ),
        (["algorithm.ref_offload=true"], "algorithm.ref_offload=true would be ignored: no KL term"),
        (
            ["algorithm.precompute_ref_logprobs=true"],
            "algorithm.precompute_ref_logprobs=true would be ignored: no KL term",
        ),
        (
            [
                *FROM_SERVER,
                "algorithm.precompute_ref_logprobs=true",
                "algorithm.policy.kl_loss_coef=1",
            ],
            "with rollout.source='server': responses that are not sampled yet have no logprobs",
        ),
        (
            [
                "algorithm.precompute_ref_logprobs=true",
                "algorithm.ref_offload=true",
                "algorithm.policy.kl_loss_coef=1",
            ],
            "algorithm.ref_offload=true would be ignored: with precompute_ref_logprobs=true",
        ),
        (
            ["algorithm.filter_groups.enabled=true"],
            "algorithm.filter_groups.enabled is unknown; did you mean 'enable'?",
        ),
        (["algorithm.filter_groups.at_limit=stop"], "must be one of 'train', 'raise'"),
        (
            ["algorithm.filter_groups.max_num_gen_batches=0"],
            "algorithm.filter_groups.max_num_gen_batches=0 must be at least 1",
        ),
        (
            [
                *("rollout.source=model", "rollout.files=[]", "rollout.num_generations=1"),
                "algorithm.filter_groups.enable=true",
            ],
            "algorithm.filter_groups.enable=true with rollout.num_generations=1: one response has",
        ),
        (["run.wandb_project=x"], "run.wandb_project needs wandb"),
        (["rollout.source=model"], "rollout.files would be ignored"),
        (
            ["rollout.source=model", "rollout.files=[]", "rollout.reward_key=[a]"],
            "rollout.reward_key=['a'] would be ignored",
        ),
        (
            ["rollout.source=model", "rollout.files=[]", "rollout.group_across_files=true"],
            "rollout.group_across_files=True would be ignored",
        ),
        (
            ["rollout.source=model", "rollout.files=[]", "rollout.max_batch_samples=7"],
            "rollout.max_batch_samples=7 must be at least 8",
        ),
        (
            ["rollout.source=model", "rollout.files=[]", "rollout.max_response_tokens=48"],
            "prefix_group.max_tokens_per_microbatch=48 must hold a prompt",
        ),
        (["rollout.source=server", "rollout.files=[]"], "rollout.server.reload=None must be one"),
        (
            ["rollout.source=model", "rollout.files=[]", "rollout.task.extractor=lastnumber"],
            "did you mean 'last_number'?",
        ),
        (
            [*FROM_SERVER, "rollout.server.base_url=localhost:8000"],
            "rollout.server.base_url='localhost:8000' must start with http:// or https://",
        ),
        (
            [*FROM_SERVER, "rollout.server.dialect=text", "rollout.top_k=3"],
            "rollout.top_k=3 with rollout.server.dialect=text: top_k and stop_token_ids are no",
        ),
        (["model.hf=null"], "model.vocab_size is needed"),
        (["model.vocab_size=50"], "model.vocab_size=50 would be ignored"),
        (["model.max_position_embeddings=0"], "model.max_position_embeddings=0 must be at least 1"),
        (["model.rotary_base=1e6"], "model.rotary_base=1000000.0 would be ignored"),
        (["model.position_embedding_type=none"], "position_embedding_type='none' would be ignored"),
        (
            ["model.untie_embeddings_and_output_weights=true"],
            "model.untie_embeddings_and_output_weights=True would be ignored, model.hf says it",
        ),
        (["model.hf=null", "run.export_hf=true"], "run.export_hf needs model.hf"),
        (
            ["model.hf=null", "model.pretrained_checkpoint=x"],
            "model.pretrained_checkpoint needs model.hf",
        ),
        (
            [
                "rollout.source=model",
                "rollout.files=[]",
                "model.hf=null",
                "algorithm.policy.kl_loss_coef=1",
            ],
            "needs its weights: set algorithm.ref_hf",
        ),
        (["parallel.sequence_parallel=true"], "needs tensor_model_parallel_size above 1"),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "needs pipeline_model_parallel_size above 1",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=1"],
            "virtual_pipeline_model_parallel_size=1 must be at least 2",
        ),
        # Overrides themselves.
        (["num_steps"], "override 'num_steps' must be section.key=value"),
        (["num_steps=3"], "override 'num_steps=3' must be section.key=value"),
        (["run.out=${nothing}"], "no valid YAML configuration"),
        (
            ["rollout.files=" + "[" * 900 + "]" * 900],
            "YAML configuration: nested too deeply, at most 64 levels",
        ),
        (["run.num_steps=1:30"], "run.num_steps: YAML reads this number in base 8 or 60"),
        (["run.num_steps=010"], "run.num_steps: YAML reads this number in base 8 or 60"),
        (["model.config={a: [0x10, -1:30.5]}"], "model.config: YAML reads this number in base"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(
    tmp_path: Path, sections: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        load(tmp_path, sections, *overrides)
    assert message in str(error.value)


def test_all_problems_are_in_one_error(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections["run"] |= {"num_steps": 0, "save_interval": -1}
    sections["optimizer"]["lr"] = -1.0
    sections["algorithm"]["adv_estimator"] = "ppo"
    with pytest.raises(ValueError, match=r"^4 problem\(s\) in .*config.yaml:") as error:
        load(tmp_path, sections)
    assert str(error.value).count("\n  - ") == 4
    sections["run"]["nmu_steps"] = sections["modle"] = {}
    with pytest.raises(ValueError, match=r"^2 problem\(s\)"):
        load(tmp_path, sections)


@pytest.mark.parametrize(
    ("overrides", "transformer"),
    [
        (["model.transformer={num_layers: 2}"], {"num_layers": 2, "hidden_size": 32}),
        (["model.transformer={}"], {}),
        (["model.transformer={ }"], {}),
        (["model.transformer={}", "model.transformer.num_layers=2"], {"num_layers": 2}),
        (["model.transformer.num_layers=2", "model.transformer={}"], {}),
    ],
)
def test_an_empty_mapping_removes_what_the_file_has(
    tmp_path: Path, sections: dict[str, Any], overrides: list[str], transformer: dict[str, Any]
) -> None:
    sections["model"]["transformer"] = {"num_layers": 4, "hidden_size": 32}
    config = load(tmp_path, sections, *overrides)
    assert config.model.transformer == transformer and config.model.hf == sections["model"]["hf"]


def test_an_empty_section_is_its_defaults(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections["algorithm"] = {"policy": {"policy_loss": "cispo"}}
    assert load(tmp_path, sections).algorithm.policy.policy_loss == "cispo"
    assert load(tmp_path, sections, "algorithm.policy={}").algorithm.policy == PolicyLossConfig()


def test_what_is_given_is_what_is_read(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections["algorithm"] = None
    config = load(tmp_path, sections, "optimizer.lr=1e-6", "run.num_steps=7", "optimizer.min_lr=0")
    assert config.optimizer.lr == 1e-6 and config.run.num_steps == 7
    assert config.algorithm == TrainConfig().algorithm
    content = config_dict(config)
    assert content["rollout"]["files"] == sections["rollout"]["files"]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(content))
    assert load_config(again) == config


KEY = "sk-very-secret"


@pytest.mark.parametrize("given", [KEY, "${oc.env:ROLLOUT_KEY}"])
def test_a_servers_key_is_read_and_shown_nowhere(
    tmp_path: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("ROLLOUT_KEY", KEY)
    server = f"rollout.server.api_key={given}"
    config = load(tmp_path, sections, *FROM_SERVER, server, "rollout.server.health_path=/up")
    assert config.rollout.server.api_key == KEY
    assert config.rollout.server.health_path == "/up"
    assert KEY not in repr(config)
    content = config_dict(config)
    assert content["rollout"]["server"]["api_key"] == "***"
    assert KEY not in str(content)
    assert config_dict(TrainConfig())["rollout"]["server"]["api_key"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.server.api_key=73194", "rollout.server.api_key=*** must be text or null"),
        ("rollout.server.api_key=[73194]", "rollout.server.api_key=*** must be text or null"),
        ("rollout.server.api_key='73194 x'", "rollout.server.api_key holds a blank"),
        ("rollout.server.api_key=''", "rollout.server.api_key is empty"),
        ("rollout.server.api_key=${oc.env:NO_SUCH_NAME}", "'NO_SUCH_NAME' not found"),
        ("rollout.server.base_url=http://me:73194@h", "must not hold a user name or password"),
        (
            "rollout.server.health_path=up",
            "health_path='up' must start with a slash",
        ),
    ],
)
def test_a_wrong_key_is_refused_without_showing_it(
    tmp_path: Path, sections: dict[str, Any], override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        load(tmp_path, sections, *FROM_SERVER, override)
    assert message in str(caught.value)
    assert "73194" not in str(caught.value)


def test_numbers_of_other_bases_are_named_by_their_line(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    path = tiny.write_config(tmp_path / "config.yaml", sections)
    text = path.read_text()
    lines = len(text.splitlines())
    path.write_text(text + "extra: '010'\nmore: [1, 0_7]\nthird: 0\nfourth: 100\n")
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(error.value).count("base 8") == 1 and f"line {lines + 2}:" in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "run: [unclosed", "just words"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ["parallel.tensor_model_parallel_size=2"], "3 ranks hold no whole replica"),
        (3, ["parallel.pipeline_model_parallel_size=3"], "num_layers=4 is no multiple of pipeline"),
        (8, ["parallel.tensor_model_parallel_size=8"], "num_attention_heads"),
        (2, ["parallel.expert_model_parallel_size=4"], "expert_model_parallel_size=4"),
        (1, ["model.transformer.attention_dropout=0.1"], "attention_dropout=0.1"),
        (1, ["model.transformer.window_size=[3,1]"], "window_size"),
        (1, ["model.transformer.num_layer=3"], "did you mean 'num_layers'?"),
        (1, ["model.transformer.params_dtype=float64"], "takes no gradients in float64"),
        (1, ["model.transformer.params_dtype=bf16"], "did you mean 'bfloat16'?"),
        (1, ["model.transformer.activation_func=swish"], "activation_func='swish' must be one"),
        (1, ["model.transformer.fp16=true"], "fp16 is not supported"),
        (1, ["model.transformer.sequence_parallel=true"], "is set by parallel.sequence_parallel"),
        (1, ["model.transformer.variable_seq_lengths=false"], "must stay true"),
        (1, ["model.hf=/nowhere"], "/nowhere"),
        (1, ["model.pretrained_checkpoint=/nowhere"], "/nowhere"),
        (1, ["algorithm.ref_hf=/nowhere", "algorithm.policy.kl_loss_coef=1"], "/nowhere"),
        (1, ["model.transformer_impl=transformer_engine"], "transformer_impl"),
        (1, ["rollout.files=[/nowhere.jsonl]"], "/nowhere.jsonl: is missing"),
        (1, ["prefix_group.max_tokens_per_microbatch=9"], "a row holds 9; raise max_tokens"),
        (
            1,
            ["algorithm.policy.importance_mode=token_mask"],
            "needs rollout_logprobs on every row",
        ),
        (1, ["rollout.source=model", "rollout.files=[]"], "there is no tokenizer.json or other"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path, sections: dict[str, Any], world_size: int, overrides: list[str], message: str
) -> None:
    config = load(tmp_path, sections, *overrides)
    with pytest.raises(ValueError, match="would stop this run") as error:
        dry_run(config, world_size)
    assert message in str(error.value)


def test_a_tokenizer_that_transformers_makes_up_is_none(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Of this architecture it makes an empty one from config.json, and every prompt is empty."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_next"}')
    assert not len(AutoTokenizer.from_pretrained(tmp_path)("text")["input_ids"])
    sampled = "rollout.source=model", "rollout.files=[]"
    config = load(tmp_path, sections, *sampled, f"model.hf={tmp_path}")
    with pytest.raises(ValueError, match=r"has no usable tokenizer: there is no tokenizer\.json"):
        load_tokenizer(config)


def test_a_dry_run_refuses_unreadable_weights(tmp_path: Path, sections: dict[str, Any]) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(tmp_path / "model", reference)
    both = ("algorithm.policy.kl_loss_coef=1", f"algorithm.ref_hf={reference}")
    dry_run(load(tmp_path, sections, *both), 1)
    (reference / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="reference/model.safetensors: not readable"):
        dry_run(load(tmp_path, sections, *both), 1)
    # A description alone is said to be one; what is left of weights is not.
    (reference / "model.safetensors").unlink()
    told = dry_run(load(tmp_path, sections, *both), 1)
    assert f"{reference} holds no weights, which the run will need" in told.lines
    (reference / "model.safetensors.index.json").write_text('{"weight_map": {"x": "lost"}}')
    with pytest.raises(ValueError, match="reference"):
        dry_run(load(tmp_path, sections, *both), 1)


def test_recorded_advantages_leave_their_estimator_nothing_to_do(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    groups = tiny.with_advantages(tiny.make_groups(5))
    sections |= tiny.run_sections(tmp_path, groups)
    dry_run(load(tmp_path, sections), 1)
    for override in ("adv_estimator=rloo", "std_floor=0.1", "norm_adv_by_std_in_grpo=false"):
        with pytest.raises(ValueError) as error:
            dry_run(load(tmp_path, sections, f"algorithm.{override}"), 1)
        name = override.split("=")[0]
        assert re.search(rf"algorithm\.{name}=\S+ concerns rewards, but", str(error.value))


def test_a_dry_run_tells_layout_packing_and_size(tmp_path: Path, sections: dict[str, Any]) -> None:
    config = load(tmp_path, sections)
    one = dry_run(config, 1)
    # Embedding and output, four layers of attention, gated MLP and two norms, and the last norm.
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert one.parameters_per_rank == 2 * tiny.VOCAB * 32 + 4 * layer + 32
    assert one.lines[0] == "1 rank: tp 1 x pp 1 (vpp 1) x dp 1"
    assert re.search(r"first step of 5 of 7 groups: \d+ logical tokens, \d+ encoded", one.lines[1])
    assert " local (model.transformer_impl=auto)" in one.lines[2]
    many = dry_run(
        load(
            tmp_path,
            sections,
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ),
        64,
    )
    assert many.lines[0] == "64 ranks: tp 2 with sp x pp 2 (vpp 1) x dp 16"
    assert many.parameters_per_rank < one.parameters_per_rank / 3


@pytest.mark.parametrize(("num_groups", "num_minibatches"), [(4, 3), (16, 1)])
def test_a_dry_run_packs_what_the_first_step_trains(
    tmp_path: Path, num_groups: int, num_minibatches: int
) -> None:
    """Of seven groups, in the order of the run; a step of more has some of them again."""
    step = tiny.first_step(
        tmp_path,
        run__groups_per_step=num_groups,
        algorithm__num_minibatches=num_minibatches,
        prefix_group__max_tokens_per_microbatch=120,
    )
    assert num_minibatches == 1 or step["packing/microbatches"] > step["tokens/unique"] // 120 + 1
    line = dry_run(load_config(tmp_path / "run.yaml"), 1).lines[1]
    found = re.search(r": ([\d,]+) logical tokens, ([\d,]+) encoded .* (\d+) microbatches", line)
    assert found is not None
    said = [int(number.replace(",", "")) for number in found.groups()]
    assert said == [step[f"tokens/{n}"] for n in ("logical", "unique")] + [
        step["packing/microbatches"]
    ]
    again = "16 groups, but 7 were recorded, and some of them stand in it 3 times"
    assert (again in line) == (num_groups == 16)
    # The first four of the file are others.
    first = tiny.make_groups()[:4]
    assert said[0] != sum(len(s.tokens) for group in first for s in group.samples)


def test_a_dry_run_tells_transformer_engine_s_layers(
    tmp_path: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_plan, "_uses_te", lambda transformer_impl: True)
    assert " transformer_engine (model." in dry_run(load(tmp_path, sections), 1).lines[2]


def test_a_dry_run_tells_which_prompts_are_resident(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    told = dry_run(load(tmp_path, sections, "prefix_group.max_tokens_per_microbatch=24"), 1).lines[
        1
    ]
    assert re.search(r"prompts of \d+ groups \(\d+ tokens\) are resident, in [2-9] wave", told)
    overrides = ("prefix_group.max_tokens_per_microbatch=24", "prefix_group.prefix_resident=never")
    assert "resident" not in "".join(dry_run(load(tmp_path, sections, *overrides), 1).lines)


def resident_line(told: DryRun) -> str:
    (line,) = (line for line in told.lines if line.startswith("of it resident prompts"))
    return line


def test_a_dry_run_counts_what_resident_prompts_keep(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Of 4 layers with 4 and 2 heads of 8 channels, in fp32."""
    kv = 2 * 2 * 8 * 4
    # On a CPU norms keep what they scale, too; a log-sum-exp for each head.
    activations = (6 * 32 + 3 * 32 + 3 * 16 + 5 * 48 + 4) * 4
    cases = {"recompute": 4 * (kv + kv), "retain": 4 * (activations + kv)}
    small = "prefix_group.max_tokens_per_microbatch=24", "prefix_group.prefix_resident=always"
    never = dry_run(load(tmp_path, sections, small[0], "prefix_group.prefix_resident=never"), 1)
    assert never.resident_bytes_per_rank == 0
    for mode, per_token in cases.items():
        overrides = (*small, f"prefix_group.prefix_resident_mode={mode}")
        told = dry_run(load(tmp_path, sections, *overrides), 1)
        found = re.fullmatch(
            rf"of it resident prompts: (\d+) tokens at once \({mode}\), about \d\.\d\d GiB",
            resident_line(told),
        )
        assert found and 0 < int(found[1]) <= 24, told.lines
        assert told.resident_bytes_per_rank == int(found[1]) * per_token
        assert told.bytes_per_rank == never.bytes_per_rank + told.resident_bytes_per_rank
        # What will be sampled is not known: the bound.
        unknown = (*overrides, "prefix_group.max_resident_tokens=1000", "rollout.source=server")
        unknown += ("rollout.files=[]", "rollout.server.model=x", "rollout.server.reload=vllm")
        tiny.save_tokenizer(tmp_path / "model")
        told = dry_run(load(tmp_path, sections, *unknown), 1)
        assert resident_line(told).startswith("of it resident prompts: up to 1,000 tokens at once")
        # Every one of two stages keeps half of the layers.
        halved = dry_run(
            load(tmp_path, sections, *unknown, "parallel.pipeline_model_parallel_size=2"), 2
        )
        assert told.resident_bytes_per_rank == 1000 * per_token
        assert halved.resident_bytes_per_rank == 500 * per_token


def test_a_dry_run_counts_the_states_of_resident_prompts(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Of 4 layers in fp32, every second one keeps a state and what its convolution sees."""
    sizes = dict(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    sizes |= dict(experimental_attention_variant="gated_delta_net", linear_attention_freq=2)
    sizes |= dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=3)
    sizes |= dict(linear_key_head_dim=6, linear_value_head_dim=10, kv_channels=8)
    sections["model"] = dict(vocab_size=tiny.VOCAB, transformer=sizes)
    overrides = ("prefix_group.max_tokens_per_microbatch=24", "prefix_group.prefix_resident=always")
    overrides += ("prefix_group.prefix_resident_mode=recompute",)
    kept, tokens = [], 0
    for width in (10, 20):
        value = f"model.transformer.linear_value_head_dim={width}"
        told = dry_run(load(tmp_path, sections, *overrides, value), 1)
        kept.append(told.resident_bytes_per_rank)
        found = re.search(r"(\d+) tokens at once", resident_line(told))
        assert found is not None
        tokens = int(found[1])
    # States of 4 heads of 6 x value, and 2 tokens of 2 x 12 + 4 x value; as many gradients.
    one, two = (2 * 2 * 4 * (24 * width + 2 * (24 + 4 * width)) for width in (10, 20))
    prompts, rest = divmod(kept[1] - kept[0], two - one)
    assert prompts >= 1 and rest == 0
    # Keys and values of 2 heads of 8 in the other layers, and as many gradients.
    assert kept[0] == tokens * 2 * 2 * (2 * 2 * 8 * 4) + prompts * one


def test_a_dry_run_tells_what_a_checkpoint_takes(tmp_path: Path, sections: dict[str, Any]) -> None:
    plain = dry_run(load(tmp_path, sections), 2)
    assert not any("checkpoint" in line for line in plain.lines)
    overrides = ("run.save_interval=5", "run.async_save=true")
    told = dry_run(load(tmp_path, sections, *overrides), 2)
    assert told.bytes_per_rank == plain.bytes_per_rank
    # Weights and two moments in fp32, divided by two ranks; a distributed optimizer has copies.
    assert told.checkpoint_bytes_per_rank == told.parameters_per_rank * 12 // 2
    (line,) = (line for line in told.lines if line.startswith("a checkpoint: 0.00 GiB of each"))
    assert line.endswith("written beside the next steps; nothing more on its device")
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        overrides += (f"model.transformer.params_dtype={dtype}",)
        shared = dry_run(
            load(tmp_path, sections, *overrides, "parallel.use_distributed_optimizer=true"), 2
        )
        assert shared.checkpoint_bytes_per_rank == told.parameters_per_rank * (width + 12) // 2


def test_a_dry_run_predicts_the_first_step(tmp_path: Path, sections: dict[str, Any]) -> None:
    def seconds(*overrides: str, world_size: int = 1, card: str = "h100") -> dict[str, float]:
        line = dry_run(load(tmp_path, sections, *overrides), world_size, card).lines[-2]
        line, *idle = line.split("; pipeline idle ")
        assert bool(idle) == any("pipeline" in override for override in overrides)
        start = f"first step on {card} cards in bf16, predicted, at the least: "
        assert line.startswith(start)
        total, named = line.removeprefix(start).split(" s (")
        parts = (part.split() for part in named.removesuffix(")").split(", "))
        return {"total": float(total)} | {name: float(value) for name, value in parts}

    plain = seconds()
    assert plain["total"] > 0 and plain.keys() >= {"products", "attention", "head", "optimizer"}
    assert seconds(card="a100")["products"] == pytest.approx(790 / 250 * plain["products"], 0.1)
    # Two epochs, and logprobs of the policy before them: 7 forward passes for 3.
    twice = seconds("algorithm.ppo_epochs=2")
    assert twice["products"] == pytest.approx(7 / 3 * plain["products"], 0.1)
    assert twice["optimizer"] == pytest.approx(2 * plain["optimizer"], 0.1)
    full = ("granularity=full", "method=uniform", "num_layers=1")
    again = seconds(*(f"model.transformer.recompute_{setting}" for setting in full))
    assert again["products"] == pytest.approx(4 / 3 * plain["products"], 0.1)
    piped = seconds("parallel.pipeline_model_parallel_size=2", world_size=2)
    assert piped["idle"] > 0 and piped["products"] == pytest.approx(plain["products"] / 2, 0.1)
    divided = seconds("parallel.context_parallel_size=2", world_size=2)
    assert divided["exchange"] > 0
    assert divided["products"] == pytest.approx(plain["products"] / 2, 0.1)


@pytest.mark.parametrize("mode", ["recompute", "retain"])
def test_a_dry_run_counts_what_windows_reach_of_resident_prompts(
    tmp_path: Path, sections: dict[str, Any], mode: str
) -> None:
    """Of 4 layers with 2 heads of 8 channels in fp32, every second one sees all keys."""
    kv = 2 * 2 * 8 * 4
    sizes = dict(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    sections["model"] = dict(vocab_size=tiny.VOCAB, transformer=sizes)
    overrides = (
        "prefix_group.max_tokens_per_microbatch=24",
        "prefix_group.prefix_resident=always",
        f"prefix_group.prefix_resident_mode={mode}",
    )
    freq = "model.transformer.window_attn_skip_freq=2"

    def kept(*window: str) -> tuple[int, int]:
        told = dry_run(load(tmp_path, sections, *overrides, *window), 1)
        tokens = re.search(r"(\d+) tokens at once", resident_line(told))
        assert tokens is not None
        return told.resident_bytes_per_rank, int(tokens[1])

    whole, tokens = kept()
    assert kept("model.transformer.window_size=[1000,0]", freq) == (whole, tokens)
    # By windows of 0, 1 and 2 tokens, two layers keep so many of each prompt.
    windows = [kept(f"model.transformer.window_size=[{n},0]", freq)[0] for n in range(3)]
    share = 2 * (kv if mode == "retain" else 2 * kv)
    assert windows[0] == whole - share * tokens
    copies = 2 * 2 * kv
    prompts = (windows[1] - windows[0]) // copies
    assert prompts > 0 and windows[1:] == [windows[0] + n * copies * prompts for n in (1, 2)]


@pytest.mark.parametrize("family", ["gemma3", "olmo3"])
def test_a_dry_run_counts_the_norms_that_a_family_has(
    family: str, tmp_path: Path, sections: dict[str, Any]
) -> None:
    model = save_hf(FAMILIES[family], tmp_path / family, num_layers=2)
    told = dry_run(load(tmp_path, sections, f"model.hf={tmp_path / family}"), 1)
    names = [name for name, _ in model.named_parameters()]
    assert sum(n.endswith("layernorm.weight") for n in names) == (8 if family == "gemma3" else 4)
    assert told.parameters_per_rank == sum(x.numel() for x in model.parameters())


def test_a_model_from_scratch_needs_its_sizes(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections["model"] = {"vocab_size": tiny.VOCAB}
    with pytest.raises(ValueError, match="needs model.transformer.num_layers, model.transformer."):
        dry_run(load(tmp_path, sections), 1)
    with pytest.raises(ValueError, match="model.vocab_size is needed for a model from scratch"):
        model_plan.plan_model(
            ModelConfig(transformer=FROM_SCRATCH["transformer"]), ParallelConfig()
        )
    sections["model"] = FROM_SCRATCH
    assert dry_run(load(tmp_path, sections), 1).parameters_per_rank > 10_000
    sections["algorithm"] = {"policy": {"kl_loss_coef": 0.1}}
    with pytest.raises(ValueError, match="needs its weights: set algorithm.ref_hf or model.hf"):
        dry_run(load(tmp_path, sections), 1)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_pass_the_dry_run(
    tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment line ``# dry-run: world_size=N key=value ...`` gives what the file leaves open.

    ``{model}`` and ``{rollouts}`` in it stand for a tiny model with a tokenizer and its rollouts,
    ``{prompts}`` for what ``examples/write_sums.py`` writes.
    """
    monkeypatch.chdir(ROOT)
    write_sums = [sys.executable, "examples/write_sums.py", "--out", str(tmp_path)]
    if "{prompts}" in example.read_text():
        subprocess.run(write_sums, check=True, env=tiny.clean_environment())
    tiny.run_sections(tmp_path)
    tiny.save_tokenizer(tmp_path / "model")
    lines = [x for x in example.read_text().splitlines() if x.startswith("# dry-run:")]
    assert len(lines) == 1, "an example says how it is checked"
    values = (
        lines[0]
        .removeprefix("# dry-run:")
        .format(model=tmp_path / "model", rollouts=tmp_path / "rollouts.jsonl", prompts=tmp_path)
    )
    world_size, *overrides = shlex.split(values)
    size = int(world_size.removeprefix("world_size="))
    assert dry_run(load_config(example, overrides), size).bytes_per_rank > 0


def test_there_are_examples() -> None:
    assert "quickstart" in {path.stem for path in EXAMPLES}
