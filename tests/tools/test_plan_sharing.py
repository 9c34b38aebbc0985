"""The predictions of ``plan_sharing`` against numbers computed by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg import PrefixTree
from megatron_pg.data import read_rollouts
from megatron_pg.parallel import ParallelSizes
from tools.flops import FORWARD_BACKWARD, FlopWeights, packed_flops, written_out_flops
from tools.plan_sharing import main
from tools.sharing.memory import layer_memory
from tools.sharing.model import GATED, UNGATED, read_model
from tools.sharing.render import print_report
from tools.sharing.report import predict_at
from tools.sharing.settings import Settings

HF = dict(
    model_type="qwen2",
    num_hidden_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
MEGATRON = dict(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    group_query_attention=True,
    num_query_groups=1,
    padded_vocab_size=32,
    swiglu=True,
)


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    """Group a: prompt of 4, responses of 2 and 3 tokens. Group b: 3 and 1, nothing to share."""
    rows = [
        dict(group_id="a", prompt_ids=[1, 2, 3, 4], response_ids=[5, 6], reward=1.0),
        dict(group_id="a", prompt_ids=[1, 2, 3, 4], response_ids=[7, 8, 9], reward=0.0),
        dict(group_id="b", prompt_ids=[1, 2, 3], response_ids=[4], reward=1.0),
    ]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    return file


def report(rollouts: Path, *more: str) -> dict:
    file = rollouts.with_name("report.json")
    arguments = [str(rollouts), "--model", str(rollouts.parent), "--json", str(file), *more]
    assert main(arguments) == 0
    return json.loads(file.read_text())


def write_groups(file: Path, **groups: list[tuple[int, int]]) -> None:
    """Groups of samples with prompts and responses of these lengths; equal lens, equal prompts."""
    rows = [
        dict(
            group_id=name,
            prompt_ids=[1] + [prompt_len] * (prompt_len - 1),
            response_ids=[100 + i] * response_len,
            reward=1.0,
        )
        for name, samples in groups.items()
        for i, (prompt_len, response_len) in enumerate(samples)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def refusal(capsys: pytest.CaptureFixture[str], rollouts: Path, *more: str) -> str:
    assert main([str(rollouts), "--model", str(rollouts.parent), *more]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_the_hand_computed_case(rollouts: Path) -> None:
    got = report(rollouts, "--pp", "2", "--max-tokens", "12")
    assert (got["groups"], got["samples"], got["depth"]) == (2, 3, 1)
    assert (got["unique_tokens"], got["logical_tokens"]) == (13, 17)
    # a: 10 in the prompt, 2*4+3 and 3*4+6 of the responses; b: 10. Written out: 21 + 28 + 10.
    assert (got["attention_pairs"], got["logical_attention_pairs"]) == (49, 59)
    # Per token 2*2 layers*(192 + 384), per pair 4*2*8, per predicted token 2*8*32.
    packed = 3 * 2304 * 13 + 3.5 * 64 * 49 + 4 * 512 * 6
    logical = 3 * 2304 * 17 + 3.5 * 64 * 59 + 4 * 512 * 6
    assert got["step_flops"] == {"packed": packed, "written_out": logical}
    assert got["predicted_step_time_ratio"] == logical / packed
    assert got["does_not_pay"] == ["b"] and got["pays"]
    assert got["does_not_fit"] == [] and got["rows"] == 2
    # One layer a stage, longest row 9 tokens, 120 values a token of 2 bytes (of which a log-sum-exp
    # of two heads is 4), 8 of them K and V.
    stages = got["memory"]
    assert [stage["activation_bytes"] for stage in stages] == [2 * 9 * 120 * 2, 9 * 120 * 2]
    assert [stage["kv_bytes"] for stage in stages] == [2 * 9 * 8 * 2, 9 * 8 * 2]
    assert [stage["resident_bytes"] for stage in stages] == [0, 0]


def test_seconds_on_a_card_are_counts_over_rates(
    rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {}
    for card in ("h100", "h200", "a100"):
        seconds[card] = report(rollouts, "--max-tokens", "12", "--card", card)["predicted_seconds"]
    assert "predicted step on a100, at the least" in " ".join(capsys.readouterr().out.split())
    # As in the hand-computed case, at 790 TFLOP/s, 3 TB/s and 255 TFLOP/s of attention.
    assert seconds["h100"]["products"] == pytest.approx(3 * 2304 * 13 / 790e12)
    assert seconds["h100"]["attention"] == pytest.approx(3.5 * 64 * 49 / 255e12)
    logits = 3 * 6 * 32 * 2
    assert seconds["h100"]["head"] == pytest.approx(4 * 512 * 6 / 790e12 + logits / 3e12)
    # Six tokens attend twice, seven are read twice; 2 heads and 1 of 4 channels, 2 layers.
    merged = 2 * (8 * 2 * (3 * 6 * 2 + 3 * 7 * 1) + 4 * 3 * 6 * 2)
    assert seconds["h100"]["merges"] == pytest.approx(merged / 3e12)
    assert seconds["h100"]["idle"] == 0 == seconds["h100"]["exchange"]
    assert seconds["h200"]["merges"] < seconds["h100"]["merges"] < seconds["a100"]["merges"]
    assert all(sum(s.values()) == pytest.approx(2 * s["total"]) for s in seconds.values())
    piped = report(rollouts, "--max-tokens", "12", "--pp", "2", "--tp", "1")["predicted_seconds"]
    assert piped["idle"] > 0


def test_groups_that_do_not_fit(rollouts: Path) -> None:
    for budget, rows, repeated in (("8", 1, 0), ("5", 2, 1)):
        got = report(rollouts, "--max-tokens", budget)
        (divided,) = got["does_not_fit"]
        assert divided["group_id"] == "a" and divided["parts"] == rows
        # The last prompt token stands in every row.
        assert divided["repeated_tokens"] == repeated
        assert "beside 3 resident tokens of its prompt" in divided["action"]
        flops = 3 * 2304 * (13 + repeated) + 3.5 * 64 * (49 + 4 * repeated) + 4 * 512 * 6
        assert got["step_flops"]["packed"] == flops
        # Two layers keep 3 tokens, 120 values of 2 bytes and 8 gradients of 4 bytes each.
        (stage,) = got["memory"]
        assert stage["resident_bytes"] == 2 * 3 * (120 * 2 + 8 * 4)
        assert stage["activation_bytes"] <= 2 * int(budget) * 120 * 2
    got = report(rollouts, "--pp", "2", "--max-tokens", "5")
    assert [s["resident_bytes"] for s in got["memory"]] == [3 * (120 * 2 + 8 * 4)] * 2
    got = report(rollouts, "--max-tokens", "3")
    too_long = got["does_not_fit"][0]
    assert too_long["parts"] is None and "truncate" in too_long["action"]
    assert not got["pays"], "what remains is group b"


def test_the_budget_follows_the_memory(rollouts: Path) -> None:
    assert report(rollouts)["recommended_max_tokens"] == 1024
    # 2 layers * 66 values * 2 bytes a token: of 120 values, 12 are of the one head that both need.
    gib = 200 * 2 * ((120 - 12) // 2 + 12) * 2 / 2**30
    got = report(rollouts, "--activation-gib", str(gib), "--tp", "2")
    assert got["recommended_max_tokens"] == 200
    # Memory for one token less than group a: its prompt stands beside the row.
    gib = 8 * 2 * 120 * 2 / 2**30
    got = report(rollouts, "--activation-gib", str(gib))
    assert got["recommended_max_tokens"] == 8 * 120 * 2 // (120 * 2 + 120 * 2 + 8 * 4) == 3
    (stage,) = report(rollouts, "--activation-gib", str(gib), "--max-tokens", "5")["memory"]
    assert stage["resident_bytes"] > 0


def test_deeper_sharing_predicts_shared_tokens_once(rollouts: Path) -> None:
    rows = [
        dict(group_id="a", prompt_ids=[1, 2], response_ids=[3, 4, n], reward=1.0) for n in (5, 6)
    ]
    rollouts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    got = report(rollouts, "--min-shared", "1")
    # Segments of 4, 1 and 1 tokens; 4 of the 6 response tokens are distinct.
    assert got["unique_tokens"] == 6
    packed = 3 * 2304 * 6 + 3.5 * 64 * (10 + 5 + 5) + 4 * 512 * 4
    assert got["step_flops"]["packed"] == packed


def test_a_row_holds_what_its_padding_leaves(rollouts: Path) -> None:
    # Rows are padded to a multiple of tp=2: of 9 tokens, 8 are left.
    more = ("--tp", "2", "--max-tokens", "9")
    write_groups(rollouts, a=[(4, 5)])
    got = report(rollouts, *more)
    assert got["row_budget"] == 8
    (divided,) = got["does_not_fit"]
    assert (divided["group_id"], divided["parts"], divided["repeated_tokens"]) == ("a", 1, 0)
    assert "beside 3 resident tokens of its prompt" in divided["action"]
    # A group that fits in no way leaves the report of the others.
    write_groups(rollouts, a=[(1, 8)], b=[(3, 5)])
    got = report(rollouts, *more)
    (too_long,) = got["does_not_fit"]
    assert (too_long["group_id"], too_long["parts"]) == ("a", None)
    assert "9 > 8" in too_long["action"]
    assert got["step_flops"]["packed"] == 3 * 2304 * 8 + 3.5 * 64 * 36 + 4 * 512 * 5


def test_memory_written_out_is_that_of_the_rows_in_flight(rollouts: Path) -> None:
    # a: 14 tokens, written out 44. b: 20 tokens that nothing shares.
    write_groups(rollouts, a=[(10, 1)] * 4, b=[(1, 19)])
    for max_tokens, packed, written_out in ((20, 20, 20), (34, 34, 64)):
        (stage,) = report(rollouts, "--max-tokens", str(max_tokens))["memory"]
        assert stage["activation_bytes"] == 2 * packed * 120 * 2
        assert stage["written_out_activation_bytes"] == 2 * written_out * 120 * 2
    # Padded to a multiple of tp, both: 13 tokens to 14, 33 to 34; a rank of two keeps 66 values.
    write_groups(rollouts, a=[(10, 1)] * 3)
    (stage,) = report(rollouts, "--tp", "2")["memory"]
    assert stage["activation_bytes"] == 2 * 14 * 66 * 2
    assert stage["written_out_activation_bytes"] == 2 * 34 * 66 * 2
    # Groups that fit in no way are in no row: b alone remains.
    write_groups(rollouts, b=[(1, 19)], c=[(1, 30)] * 8)
    (stage,) = report(rollouts, "--max-tokens", "20")["memory"]
    assert stage["written_out_activation_bytes"] == stage["activation_bytes"] == 2 * 20 * 120 * 2


def test_memory_beside_resident_prompts(rollouts: Path) -> None:
    # Rows of a, 6 tokens after the 3 resident ones, and of b, 4 tokens. Written out, a is 6 + 7.
    (stage,) = report(rollouts, "--max-tokens", "8")["memory"]
    assert stage["activation_bytes"] == 2 * 6 * 120 * 2
    assert stage["written_out_activation_bytes"] == 2 * 13 * 120 * 2
    # Keys and values are 8 of the values, of the row and of the resident tokens.
    assert stage["kv_bytes"] == 2 * (6 + 3) * 8 * 2


def test_windows_keep_less_of_resident_prompts(rollouts: Path) -> None:
    """Of the 3 resident tokens the layer with a window keeps 2, in copies of their own."""
    config = HF | dict(layer_types=["sliding_attention", "full_attention"])
    for window, kept in ((3, 2), (4, 3)):
        layers = config | dict(sliding_window=window, use_sliding_window=True)
        (rollouts.parent / "config.json").write_text(json.dumps(layers))
        first, second = report(rollouts, "--max-tokens", "8", "--pp", "2")["memory"]
        copies = 8 * 2 if kept < 3 else 0
        assert first["resident_bytes"] == 3 * 120 * 2 + kept * (copies + 8 * 4)
        assert second["resident_bytes"] == 3 * (120 * 2 + 8 * 4)
        assert first["kv_bytes"] == (first["rows_in_flight"] * 6 + kept) * 8 * 2


def test_prompts_of_one_group_may_differ(rollouts: Path) -> None:
    write_groups(rollouts, a=[(10, 5), (100, 5), (100, 5)])
    got = report(rollouts)
    assert (got["prompt_len"]["min"], got["prompt_len"]["mean"]) == (10, 70)
    # Roots of 10 and 100 tokens; all 15 response tokens are distinct.
    pairs = 15 * 16 // 2 + 100 * 101 // 2 + 2 * (5 * 100 + 15)
    packed = 3 * 2304 * 125 + 3.5 * 64 * pairs + 4 * 512 * 15
    logical = 3 * 2304 * 225 + 3.5 * 64 * (120 + 2 * 105 * 106 // 2) + 4 * 512 * 15
    assert got["step_flops"] == {"packed": packed, "written_out": logical}
    assert got["group_ratios"] == {"a": logical / packed}


def test_how_rows_are_read_can_be_said(rollouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"group_index": 0, "status": "completed", "reward": {"math": 1.0, "form": 0.5}}
    files = [rollouts.with_name(f"{i}.pt") for i in range(2)]
    for number, file in enumerate(files):
        samples = [sample | {"tokens": [1, 2, 3 + number], "response_length": 1}]
        torch.save({"rollout_id": 0, "samples": samples}, file)
    assert "name those to be summed in reward_key" in refusal(capsys, files[0])
    file = rollouts.with_name("report.json")
    arguments = [*map(str, files), "--model", str(rollouts.parent), "--json", str(file)]
    arguments += ["--reward-key", "math", "--reward-key=form"]
    for more, num_groups in ([], 2), (["--group-across-files"], 1):
        assert main([*arguments, *more]) == 0
        assert len(json.loads(file.read_text())["group_ratios"]) == num_groups


def test_aborted_responses_are_not_counted(
    rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = report(rollouts)
    rows = rollouts.read_text()
    aborted = json.loads(rows.splitlines()[0]) | {"status": "aborted"}
    rollouts.write_text(rows + json.dumps(aborted) + "\n" + json.dumps(aborted | {"group_id": "c"}))
    assert report(rollouts) == want
    rollouts.write_text(json.dumps(aborted))
    capsys.readouterr()
    assert "there is nothing to train" in refusal(capsys, rollouts)


def test_trained_tokens_are_counted_by_their_masks(rollouts: Path) -> None:
    rows = [
        dict(group_id="a", prompt_ids=[1], response_ids=[3, 4, n], loss_mask=mask, reward=1.0)
        for n, mask in ((5, [1, 0, 1]), (6, [1, 1, 1]))
    ]
    rollouts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    # In one row, 3 is trained by both, 4 by one.
    got = report(rollouts, "--min-shared", "1")
    assert got["step_flops"]["packed"] == 3 * 2304 * 5 + 3.5 * 64 * (6 + 4 + 4) + 4 * 512 * 4
    # Rows of their own predict 3 twice.
    got = report(rollouts, "--min-shared", "1", "--max-tokens", "4")
    assert got["rows"] == 2
    assert got["step_flops"]["packed"] == 3 * 2304 * 8 + 3.5 * 64 * 20 + 4 * 512 * 5


def test_context_parallel_ranks_divide_tokens_and_heads(
    rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_groups(rollouts, a=[(10, 1)] * 3)
    one = report(rollouts, "--max-tokens", "14")
    got = report(rollouts, "--max-tokens", "14", "--cp", "2")
    assert "tp=1, pp=1, cp=2" in " ".join(capsys.readouterr().out.split())
    assert got["step_flops"] == one["step_flops"], "of all ranks"
    # A row of 13 tokens is padded to 14, of which a rank has 7. Both ranks hold the one key head
    # that their queries share, and q, k, v as exchanged; the output before and after that: 4
    # values more than the 120 of a rank that is alone.
    (stage,) = got["memory"]
    assert stage["activation_bytes"] == 2 * 7 * (120 + 4) * 2
    assert stage["kv_bytes"] == 2 * 7 * (8 + 8) * 2
    assert stage["written_out_activation_bytes"] == 2 * 17 * (120 + 4) * 2
    alone, half = (r["predicted_seconds"] for r in (one, got))
    for name in ("products", "attention", "merges", "head"):
        assert half[name] == pytest.approx(alone[name] / 2)
    # Half of half of the row, of 2 + 2 heads of 4 + 4 channels, in 2 layers, twice, of 2 bytes.
    assert half["exchange"] == pytest.approx(13 / 4 * 4 * 8 * 2 * 2 * 2 / 360e9)
    # Longer rows fit, and what stays resident is divided too.
    gib = ("--activation-gib", str(14 * 2 * (120 + 4) / 2**30))
    held = [report(rollouts, *gib, "--cp", cp)["recommended_max_tokens"] for cp in ("1", "2")]
    assert held == [14 * (120 + 4) // (2 * (120 + 120 + 16)), 14]


def test_context_parallelism_is_refused_where_it_divides_no_heads(
    rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, rollouts, "--cp", "4")
    assert "num_attention_heads=2 is no multiple of cp=4" in message
    assert "the largest cp below that fits is 2" in message


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--tp=0", "tp=0 must be at least 1"),
        ("--tp=3", "num_attention_heads=2 is no multiple of tp=3"),
        ("--pp=0", "pp=0 must be at least 1"),
        ("--pp=3", "num_layers=2 is no multiple of pp=3"),
        ("--cp=0", "cp=0 must be at least 1"),
        ("--max-tokens=0", "max_tokens=0 holds no row"),
        ("--min-shared=0", "min_shared=0 must be at least 1"),
        ("--bytes-per-value=0", "bytes_per_value=0 must be at least 1"),
        ("--activation-gib=0", "activation_gib=0.0 must be finite and above 0"),
        ("--activation-gib=nan", "activation_gib=nan must be finite and above 0"),
        ("--json=/nowhere/report.json", "/nowhere is no folder; create it"),
    ],
)
def test_impossible_settings_are_refused(
    rollouts: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert message in refusal(capsys, rollouts, setting)


def test_all_settings_are_refused_at_once(
    rollouts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    more = ("--tp=3", "--pp=0", "--cp=4", "--max-tokens=2", "--tokenizer=nowhere")
    message = refusal(capsys, rollouts, *more)
    assert "6 problem(s)" in message
    for part in (
        "num_attention_heads=2 is no multiple of tp=3",
        "ffn_hidden_size=16 is no multiple of tp=3",
        "pp=0 must be at least 1",
        "num_attention_heads=2 is no multiple of tp=3 x cp=4",
        "max_tokens=2 holds no row of a multiple of 12 tokens",
        "--tokenizer needs transformers: pip install",
    ):
        assert part in message
    groups, dims = read_rollouts(rollouts), read_model(rollouts.parent)
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        predict_at(groups, dims, Settings(sizes=ParallelSizes(tp=0)), [8])
    # Beside a model that cannot be read, the values alone.
    for text in ("{", "[" * 100_000, '{"vocab_size": 11, "vocab_size": 12}'):
        (rollouts.parent / "config.json").write_text(text)
        message = refusal(capsys, rollouts, *more)
        assert "4 problem(s)" in message and "config.json is no JSON" in message


def test_a_tokenizer_that_is_none_is_refused(
    rollouts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(capsys, rollouts, "--tokenizer", str(rollouts.parent / "nowhere"), "--pp=0")
    assert "2 problem(s)" in message and "nowhere could not be loaded (" in message
    assert "name a folder with a tokenizer" in message


def test_parquet_without_pyarrow_is_refused(
    rollouts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = rollouts.rename(rollouts.with_suffix(".parquet"))
    assert "parquet files need pyarrow: pip install" in refusal(capsys, file)


def test_the_printed_tables(rollouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    write_groups(rollouts, **{f"group{i}": [(4, 2), (4, 3)] for i in range(22)})
    got = report(rollouts, "--tp", "2", "--max-tokens", "9")
    capsys.readouterr()
    print_report(got, Console(width=200))
    text = capsys.readouterr().out
    for part in (
        "depth of the deepest tree",
        "FLOPs of a step",
        "recommended token budget",
        "Peak memory of one rank, tp=2, pp=1, cp=1",
        "K and V",
        "Groups longer than a row of 8 tokens",
        "group19",
        "and 2 more, all in --json",
    ):
        assert part in text
    assert "group20" not in text


@pytest.mark.megatron
@pytest.mark.parametrize("lens", [(32, 8, 4), (24, 40, 3), (16, 4, 1)])
def test_a_star_is_predicted_the_bound_that_its_step_is_measured_against(
    rollouts: Path, lens: tuple[int, int, int]
) -> None:
    pytest.importorskip("megatron.core")
    from tools.bench.gpt import make_dims
    from tools.bench.registry import Options
    from tools.bench.shapes import flop_bound, star

    prefix_len, suffix_len, num_generations = lens
    dims = make_dims(Options())
    config = dict(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_query_groups,
        padded_vocab_size=dims.vocab_size,
        swiglu=True,
    )
    (rollouts.parent / "config.json").write_text(json.dumps(config))
    prompt = list(range(prefix_len))
    rows = [
        dict(group_id="a", prompt_ids=prompt, response_ids=[100 + i] * suffix_len, reward=1.0)
        for i in range(num_generations)
    ]
    rollouts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    bound = flop_bound(star(*lens), dims.cost_model, FORWARD_BACKWARD)
    assert report(rollouts)["predicted_step_time_ratio"] == pytest.approx(bound, rel=1e-12)


def test_both_kinds_of_config_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "args.json").write_text(json.dumps(MEGATRON))
    assert read_model(tmp_path) == read_model(tmp_path / "args.json")


@pytest.mark.megatron
@pytest.mark.parametrize("name", ["Kimi-K2", "MiniMax-M2"])
def test_folders_of_fp8_are_counted_as_their_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from tests.checkpoint.test_published import PUBLISHED

    counted = []
    for quantised in ({}, dict(quantization_config=dict(quant_method="fp8"))):
        # As the file says it: layers of full attention, by a key that no other family takes.
        kinds = dict(attn_type_list=[1] * 62) if name == "MiniMax-M2" else {}
        config = PUBLISHED[name] | kinds | quantised
        (tmp_path / "config.json").write_text(json.dumps(config))
        counted.append(read_model(tmp_path))
    assert counted[0] == counted[1] and counted[0].training_refusal is None
    refusal = counted[1].training_refusal
    assert refusal is not None and "FineGrainedFP8Config(dequantize=True)" in refusal


@pytest.mark.megatron
def test_families_that_training_holds_are_counted_by_their_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to what is counted without Megatron-Core, and of unknown type all the same."""
    pytest.importorskip("megatron.core")
    from megatron_pg.checkpoint import FAMILIES
    from tests.checkpoint.folders import make_config

    counted = {}
    architectures = list(FAMILIES)
    for held in (True, False):
        if not held:
            monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
        for architecture in architectures:
            config = make_config(architecture)
            if config.get("sliding_window") is not None:
                # Only a family knows which layers have windows where none are named.
                config["layer_types"] = ["full_attention"] * 2
            (tmp_path / "config.json").write_text(json.dumps(config))
            counted[architecture, held] = read_model(tmp_path)
    for architecture in architectures:
        ours, generic = counted[architecture, True], counted[architecture, False]
        assert ours == generic and ours.max_positions == generic.max_positions
    monkeypatch.undo()
    monkeypatch.setattr("tools.sharing.model.GATED", set())
    assert read_model(tmp_path) == ours


# Where transformers' own defaults are no model of full attention, or no model at all.
OF_TYPE = {
    "deepseek_v2": dict(num_experts_per_tok=6),
    "mistral": dict(sliding_window=None),
    "nemotron": dict(num_key_value_heads=8),
}


def active_weights(model: torch.nn.Module, active: float) -> float:
    """Weights of matrices in decoder layers that a token meets; of experts it meets a share."""
    total = 0.0
    for name, weight in model.named_parameters():
        # Biases of all experts lie in one tensor.
        is_none = "router" in name or name.endswith(("gate.weight", "_bias"))
        if re.search(r"(layers|\.h)\.\d+\.", name) and weight.ndim > 1 and not is_none:
            is_stacked = weight.ndim == 3 and "conv1d" not in name
            is_routed = is_stacked or re.search(r"experts\.\d", name) is not None
            total += weight.numel() * (active if is_routed else 1.0)
    return total


@pytest.mark.parametrize("model_type", sorted(GATED | UNGATED))
def test_known_types_are_counted_as_transformers_builds_them(
    tmp_path: Path, model_type: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[model_type](**OF_TYPE.get(model_type, {}))
    values = json.loads(config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(values))
    dims = read_model(tmp_path)
    is_part = type(config) not in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModel if is_part else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((values[key] for key in counts if values.get(key)), 1)
    topk = values.get("num_experts_per_tok") or 1
    scans = 0.0 if dims.linear is None else dims.num_linear_layers * dims.linear.scan_flops
    counted = 2 * active_weights(model, topk / experts) + scans
    assert dims.cost_model.per_token == pytest.approx(counted, rel=1e-12)
    # An optimizer updates all experts, and what makes the logits.
    updated = active_weights(model, 1.0) + dims.hidden_size * dims.vocab_size
    assert dims.num_parameters == pytest.approx(updated, rel=1e-12)
    has_scan = any(
        n.endswith(("linear_attn", "dt_bias", "A_log"))
        for n, _ in [*model.named_modules(), *model.named_parameters()]
    )
    assert (dims.linear is not None) == has_scan
    assert dims.gated == (model_type in GATED)
    names = " ".join(name for name, _ in model.named_modules())
    norms = ("q_norm", "q_layernorm", "q_a_layernorm", "kv_a_layernorm", "query_layernorm")
    assert dims.modules.has_qk_norms == any(norm in names for norm in norms)
    behind = ("post_feedforward_layernorm", "post_mlp_layernorm")
    is_behind = any(norm in names for norm in behind)
    assert dims.modules.has_norms_behind == is_behind
    assert dims.modules.has_norms_before == ("input_layernorm" in names or not is_behind)


@pytest.mark.parametrize("change", [dict(model_type="apertus"), dict(model_type="of_tomorrow")])
def test_types_of_which_nothing_is_known_are_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    named = f"config.json .model_type='{change['model_type']}'.: it is not known.*args.json"
    with pytest.raises(ValueError, match=named):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "config, missing",
    [
        (
            {k: v for k, v in HF.items() if k != "intermediate_size"} | {"model_type": "opt"},
            "intermediate_size",
        ),
        (dict(model_type="bloom", n_layer=2, n_head=2, hidden_size=8, vocab_size=32), "n_embd"),
        (
            dict(model_type="gpt_neo", num_layers=2, num_heads=2, hidden_size=8, vocab_size=32),
            "num_attention_heads",
        ),
        (
            dict(model_type="qwen2", num_hidden_layers=2),
            "hidden_size, num_attention_heads, intermediate_size, vocab_size",
        ),
    ],
)
def test_missing_sizes_are_named(tmp_path: Path, config: dict[str, object], missing: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = rf"\(model_type='{config['model_type']}'\) has no {missing}, which"
    with pytest.raises(ValueError, match=named + ".*args.json.*ffn_hidden_size"):
        read_model(tmp_path)


def test_unusable_input_is_named(rollouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rollouts.parent / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    assert main([str(rollouts), "--model", str(rollouts.parent)]) == 2
    assert "num_attention_heads" in capsys.readouterr().err
    assert main([str(rollouts), "--model", str(rollouts.parent / "nowhere")]) == 2


def test_the_page_of_plots(rollouts: Path) -> None:
    page = rollouts.with_name("page.png")
    report(rollouts, "--plot", str(page))
    assert page.read_bytes().startswith(b"\x89PNG")


DEEPSEEK = dict(
    model_type="deepseek_v3",
    architectures=["DeepseekV3ForCausalLM"],
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=12,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=20,
    vocab_size=32,
    max_position_embeddings=64,
)
LATENT = dict(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    moe_ffn_hidden_size=16,
    num_experts=8,
    moe_shared_expert_intermediate_size=32,
    moe_router_topk=3,
    moe_layer_freq=[0, 1, 1],
    num_attention_heads=4,
    multi_latent_attention=True,
    q_lora_rank=24,
    kv_lora_rank=12,
    qk_head_dim=16,
    qk_pos_emb_head_dim=8,
    v_head_dim=20,
    qk_layernorm=True,
    padded_vocab_size=32,
    swiglu=True,
)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def test_latent_attention_and_shared_experts_are_counted(tmp_path: Path) -> None:
    """Against transformers' own layers, of which a token meets 3 of 8 experts."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    (tmp_path / "args.json").write_text(json.dumps(LATENT))
    dims = read_model(tmp_path)
    assert dims == read_model(tmp_path / "args.json")
    config = transformers.DeepseekV3Config(
        **{k: v for k, v in DEEPSEEK.items() if k != "model_type"}
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    weights = 0
    for number, layer in enumerate(model.model.layers):
        weights += parameters(layer.self_attn)
        if number == 0:
            weights += parameters(layer.mlp)
        else:
            weights += parameters(layer.mlp.shared_experts) + 3 * 3 * 64 * 16
    assert dims.cost_model.per_token == 2 * weights
    # Scores over 16 + 8 channels, values of 20, four heads, three layers.
    assert dims.cost_model.per_attention_pair == 2 * 3 * 4 * (24 + 20)
    memory = layer_memory(dims, Settings())[0]
    assert memory.kv == 2 * 4 * (24 + 20)
    # Two norms' and two products' inputs; q, k, v; out and, of 4 bytes, its log-sum-exp; latents
    # and norms of them; MLP.
    attention = 4 * 64 + 2 * 4 * 24 + 2 * 4 * 20 + 4 * 2 + 2 * (24 + 12) + 8
    assert memory.activations == 2 * (attention + 3 * 96)
    # A copy for each expert and what it makes of it; shared experts; what the router keeps.
    experts, router = 3 * (64 + 3 * 16) + 3 * 32, 5 * 8 + 24 * 3
    assert layer_memory(dims, Settings())[1].activations == 2 * (attention + experts) + router


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("config", "named"),
    [
        (HF | dict(architectures=["CohereForCausalLM"], model_type="cohere"), "CohereForCausalLM"),
        (MEGATRON | dict(qk_l2_norm=True), "qk_l2_norm=True"),
    ],
    ids=["huggingface", "megatron"],
)
def test_a_model_that_training_refuses_never_pays(
    rollouts: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object], named: str
) -> None:
    pytest.importorskip("megatron.core")
    more = dict(max_position_embeddings=64, norm_epsilon=1e-5, normalization="RMSNorm")
    (rollouts.parent / "config.json").write_text(json.dumps(config | more))
    got = report(rollouts)
    out = capsys.readouterr().out
    assert not got["pays"] and named in got["training_refuses"]
    assert "Training refuses this model" in out and "Sharing pays" not in out
    assert got["predicted_step_time_ratio"] > 1.03, "the numbers alone would say that it pays"


@pytest.mark.megatron
def test_a_model_that_training_takes_pays(
    rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("megatron.core")
    supported = dict(
        architectures=["Qwen2ForCausalLM"], rms_norm_eps=1e-6, max_position_embeddings=7
    )
    (rollouts.parent / "config.json").write_text(json.dumps(HF | supported))
    got = report(rollouts)
    assert got["training_refuses"] is None and got["pays"]
    assert "Sharing pays" in capsys.readouterr().out
    (rollouts.parent / "config.json").write_text(
        json.dumps(HF | supported | {"max_position_embeddings": 6})
    )
    message = refusal(capsys, rollouts)
    assert "group 'a' has a sample of 7 tokens" in message
    assert "max_position_embeddings=6: training refuses it" in message


@pytest.mark.parametrize(
    ("change", "width"),
    [
        (dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6), [12, 12]),
        (
            dict(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=6,
                shared_expert_intermediate_size=5,
                mlp_only_layers=[1],
            ),
            [17, 16],
        ),
        (
            dict(
                num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, decoder_sparse_step=2
            ),
            [16, 12],
        ),
        (
            dict(
                n_routed_experts=4,
                num_experts_per_tok=1,
                moe_intermediate_size=6,
                n_shared_experts=2,
                first_k_dense_replace=1,
            ),
            [16, 18],
        ),
        (dict(num_local_experts=4, num_experts_per_tok=2), [32, 32]),
        (dict(num_experts=1), [16, 16]),
    ],
)
def test_every_layer_s_mlp_is_counted(
    tmp_path: Path, change: dict[str, object], width: list[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    dims = read_model(tmp_path)
    assert dims.mlps.used == tuple(width)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(sliding_window=4, max_position_embeddings=64), "sliding_window=4"),
        (
            dict(layer_types=["full_attention", "sliding_attention"]),
            "'sliding_attention', but sliding_window=None; set sliding_window, or name",
        ),
        (dict(layer_types=["full_attention"]), "names 1 layers, num_hidden_layers=2; name each"),
        (dict(layer_types="full_attention"), "is no list, num_hidden_layers=2"),
        (
            dict(layer_types=["full_attention", "wide_attention"]),
            "names 'wide_attention': layers of this type are full_attention, sliding_attention; "
            "correct it",
        ),
        (dict(layer_types=["full_attention", "conv"]), "are not counted"),
        (
            dict(model_type="qwen3_next", full_attention_interval="2"),
            "full_attention_interval=2 must be a whole number from 1",
        ),
        (dict(layer_types=["full_attention", "linear_attention"]), "are not counted"),
        (dict(linear_num_key_heads=2), "linear_num_key_heads=2"),
        (dict(model_type="kimi_linear", linear_attn_config={"a": 1}), "linear_attn_config="),
        (dict(mamba_d_state=16), "mamba_d_state=16"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder=True"),
        (dict(num_experts=4), "num_experts=4"),
        (dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1), "num_shared_experts=1"),
        (dict(hidden_size="wide"), "no numbers"),
        (dict(vocab_size=0), "vocab_size=0"),
        (dict(num_key_value_heads=3), "num_query_groups=3"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(
    rollouts: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], named: str
) -> None:
    (rollouts.parent / "config.json").write_text(json.dumps(HF | change))
    message = refusal(capsys, rollouts)
    assert named in message and "config.json" in message


@pytest.mark.parametrize(
    ("file", "content", "change", "windows"),
    [
        ("args.json", MEGATRON, dict(window_size=[4, 0]), (4, 4)),
        ("args.json", MEGATRON, dict(window_size=[4, 0], window_attn_skip_freq=2), (4, None)),
        ("args.json", MEGATRON, dict(window_size=[4, 0], window_attn_skip_freq=[0, 1]), (None, 4)),
        ("config.json", HF, dict(model_type="mixtral", sliding_window=4), (3, 3)),
        (
            "config.json",
            HF,
            dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4),
            (3, None),
        ),
        (
            "config.json",
            HF,
            dict(model_type="starcoder2", sliding_window=4, use_sliding_window=False),
            (None, None),
        ),
    ],
)
def test_windows_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: Any,
    change: Any,
    windows: Any,
) -> None:
    """A token of a written-out sample of 6 sees 1 to 6 keys, or at most a window's and itself."""
    monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
    (tmp_path / file).write_text(json.dumps(content | change))
    dims = read_model(tmp_path)
    assert dims.windows == windows
    weights = FlopWeights(0, 1, 0)
    tree = PrefixTree.from_group(4, [2, 1])
    # Two heads of 4 channels, scores and values, two FLOPs each.
    per_pair = 2 * 2 * 2 * 4
    pairs = [[min(p, 9 if w is None else w) + 1 for p in range(6)] for w in windows]
    unique, logical = ([*row, row[4]] for row in pairs), ([*row, *row[:5]] for row in pairs)
    assert packed_flops(tree, 0, dims.cost_model, weights) == per_pair * sum(map(sum, unique))
    assert written_out_flops(tree, 0, dims.cost_model, weights) == per_pair * sum(map(sum, logical))


NEXT = HF | dict(
    model_type="qwen3_next",
    num_hidden_layers=4,
    full_attention_interval=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    linear_conv_kernel_dim=3,
    head_dim=4,
)


def test_a_model_with_linear_attention(
    rollouts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second of four layers attends; by hand, as the tests of the cost model have it."""
    monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
    (rollouts.parent / "config.json").write_text(json.dumps(NEXT))
    named = {k: v for k, v in MEGATRON.items() if k != "num_layers"}
    named |= {k: v for k, v in NEXT.items() if k.startswith("linear_")}
    named |= dict(experimental_attention_variant="gated_delta_net", attention_output_gate=True)
    named |= dict(qk_layernorm=True)
    named |= dict(num_layers=4, linear_attention_freq=2, kv_channels=4)
    (rollouts.parent / "args.json").write_text(json.dumps(named))
    dims = read_model(rollouts.parent)
    assert dims == read_model(rollouts.parent / "args.json")
    assert dims.mixers == ("gated_delta", "attention") * 2 and dims.linear is not None
    attention, linear = 8 * (2 * 8 + 2 * 4 + 8), 8 * (56 + 24 + 8 + 24) + 3 * 56
    weights = 2 * attention + 2 * linear + 4 * 3 * 8 * 16
    assert dims.cost_model.per_token == 2 * weights + 2 * dims.linear.scan_flops
    # As of the two layers of the model above.
    assert dims.cost_model.per_attention_pair == 64
    # Rows of 8 tokens keep the 3 that a waits for resident, in each layer that carries a state as
    # much as in any other row: 4 heads of 8 x 6 in fp32 and 2 tokens of 56 channels.
    state = 4 * 4 * 8 * 6
    whole, longer = (report(rollouts, "--max-tokens", budget)["memory"][0] for budget in ("8", "5"))
    assert whole["resident_bytes"] > 2 * (2 * state + 2 * 56 * (2 + 4))
    assert longer["resident_bytes"] == whole["resident_bytes"]
    kept = layer_memory(dims, Settings())
    # Of a row of 9 tokens each of 3 segments begins from a state of both layers; written out none.
    (stage,) = report(rollouts, "--max-tokens", "12")["memory"]
    whole_rows = sum(memory.activations for memory in kept)
    assert stage["activation_bytes"] == 9 * whole_rows + 3 * 2 * (state + 2 * 56 * 2)
    assert stage["written_out_activation_bytes"] == 13 * whole_rows
    assert [memory.kept == memory.kv == 0 for memory in kept] == [True, False, True, False]
    got = report(rollouts, "--cp", "2", "--max-tokens", "12")["predicted_seconds"]
    # 13 tokens; heads as above in 2 layers, 64 channels before the scan and 24 behind it in 2,
    # forward and backward.
    per_token = 2 * 4 * 8 / 4 + 2 * (64 + 24) / 4
    assert got["exchange"] == pytest.approx(2 * 13 * per_token * 2 / 360e9)
    capsys.readouterr()
    assert "linear_num_key_heads=2 is no multiple of tp=4" in refusal(capsys, rollouts, "--tp=4")


@pytest.mark.parametrize(
    "change",
    [
        dict(window_size=[128, 1]),
        dict(window_size=128),
        dict(window_attn_skip_freq=[1], window_size=[4, 0]),
        dict(window_attn_skip_freq=0, window_size=[4, 0]),
        dict(moe_latent_size=8),
    ],
)
def test_arguments_that_are_not_counted_are_refused_by_name(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (tmp_path / "args.json").write_text(json.dumps(MEGATRON | change))
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*are not counted"):
        read_model(tmp_path)


NEMOTRON = {k: v for k, v in HF.items() if k != "num_hidden_layers"} | dict(
    model_type="nemotron_h",
    layers_block_type=["linear_attention", "mlp", "full_attention", "mamba", "moe", "mlp"],
    head_dim=4,
    mamba_num_heads=4,
    mamba_head_dim=6,
    n_groups=2,
    ssm_state_size=5,
    conv_kernel=4,
    moe_intermediate_size=6,
    moe_shared_expert_intermediate_size=10,
    n_routed_experts=4,
    num_experts_per_tok=2,
)


def as_arguments(config: dict[str, Any], pattern: str) -> dict[str, Any]:
    sizes = dict(
        hybrid_layer_pattern=pattern,
        num_layers=len(pattern.replace("|", "")),
        is_hybrid_model=True,
        kv_channels=4,
        position_embedding_type="none",
        swiglu=False,
        num_experts=4,
        moe_ffn_hidden_size=6,
        moe_shared_expert_intermediate_size=10,
        mamba_num_groups=config["n_groups"],
        mamba_state_dim=config["ssm_state_size"],
    )
    return MEGATRON | {k: v for k, v in config.items() if k.startswith("mamba_")} | sizes


def test_a_hybrid_is_counted_layer_by_layer(
    rollouts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
    config, folder = rollouts.parent / "config.json", rollouts.parent
    config.write_text(json.dumps(NEMOTRON))
    (folder / "args.json").write_text(json.dumps(as_arguments(NEMOTRON, "M-*M|E-")))
    dims = read_model(folder)
    assert dims == read_model(folder / "args.json") and dims.linear is not None
    older = {k: v for k, v in NEMOTRON.items() if k != "layers_block_type"}
    config.write_text(json.dumps(older | dict(hybrid_override_pattern="M-*ME-")))
    assert read_model(folder) == dims
    state, attends = "state_space", "attention"
    assert dims.mixers == (state, None, attends, state, None, None)
    # Two experts of 6 and what all tokens go through.
    assert dims.mlps.used == (0, 16, 0, 0, 2 * 6 + 10, 16)
    inner, groups = 4 * 6, 2 * 2 * 5
    mamba = 8 * (3 * inner + groups + 4) + 4 * (inner + groups)
    weights = 2 * mamba + 8 * (2 * 8 + 2 * 4) + 2 * 8 * (16 + 22 + 16)
    assert dims.cost_model.per_token == 2 * weights + 2 * dims.linear.scan_flops
    assert dims.cost_model.per_attention_pair == 2 * 2 * (4 + 4)
    memory = layer_memory(dims, Settings())
    assert [of.state > 0 for of in memory] == [True, False, False, True, False, False]
    assert [of.kv for of in memory] == [0, 0, 2 * 2 * 4, 0, 0, 0]
    # What a norm reads and returns; the MLP.
    assert memory[1].activations == 2 * (2 * 8 + 2 * 16)
    # A prefix that stays keeps both states and their gradients, whatever its length.
    whole, longer = (
        report(rollouts, "--max-tokens", budget, "--pp", "2")["memory"] for budget in ("8", "5")
    )
    assert whole[0]["resident_bytes"] == longer[0]["resident_bytes"] > 0
    # Rows are gathered and summed around six parts, of which a decoder of six layers has twelve.
    sent = report(rollouts, "--tp", "2", "--max-tokens", "12")["predicted_seconds"]["exchange"]
    assert sent == pytest.approx(6 * 5 * 8 / 2 * 13 * 2 / 360e9)
    capsys.readouterr()
    assert "mamba_num_groups=2 is no multiple of tp=4" in refusal(capsys, rollouts, "--tp=4")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(layers_block_type=["mamba", "wide"]), "must name every layer, one of linear_att"),
        (dict(layers_block_type="M*"), "must name every layer"),
        (dict(num_hidden_layers=7), "'M-*ME-' names 6 layers, its number of layers is 7"),
        (dict(moe_intermediate_size=None), "has no moe_intermediate_size"),
        (dict(layers_block_type=None, hybrid_override_pattern="MD"), "layers D are not known"),
        (dict(moe_latent_size=4), "moe_latent_size=4: FLOPs and memory of such layers"),
    ],
)
def test_layers_of_a_hybrid_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], named: str
) -> None:
    monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON | change))
    with pytest.raises(ValueError, match=re.escape(named)):
        read_model(tmp_path)


def test_arguments_of_two_kinds_of_states_are_refused(tmp_path: Path) -> None:
    values = as_arguments(NEMOTRON, "MG*")
    (tmp_path / "args.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="Gated DeltaNet and Mamba-2 layers.*not counted together"):
        read_model(tmp_path)


@pytest.mark.megatron
@pytest.mark.parametrize("tp", [1, 2])
def test_layers_keep_what_the_dry_run_says(tmp_path: Path, tp: int) -> None:
    """Of every family and every kind of its layers, on a rank of a card with its kernels."""
    pytest.importorskip("megatron.core")
    from megatron_pg.checkpoint import FAMILIES
    from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
    from megatron_pg.train.config import ModelConfig, ParallelConfig
    from megatron_pg.train.dry_run.layers import layer_memory as memory_of_kind
    from megatron_pg.train.model import plan_model
    from tests.checkpoint.folders import make_config

    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_tensor_parallel_size=tp,
    )
    settings, found = Settings(sizes=ParallelSizes(tp=tp, sp=tp > 1)), 0
    for architecture in FAMILIES:
        if architecture == "NemotronHForCausalLM" and not HAS_HYBRID_MODEL:
            continue
        (tmp_path / "config.json").write_text(json.dumps(make_config(architecture)))
        dims = read_model(tmp_path)
        if tp > 1 and (architecture == "GptOssForCausalLM" or dims.attention.has_output_gate):
            # Biases of experts are not divided, nor, in some versions, gates of one group.
            continue
        plan = plan_model(ModelConfig(hf=str(tmp_path)), parallel, card="h100")
        got = layer_memory(dims, settings)
        want = [memory_of_kind(plan, kind) for kind in plan.layer_kinds]
        for name in ("activations", "kv", "kept", "kept_grads", "state", "state_grads"):
            assert [getattr(m, name) for m in got] == [getattr(m, name) for m in want], architecture
        found += len(got)
    assert found > 25


def test_the_budget_follows_the_fullest_stage(
    rollouts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage keeps one row of three MLPs, the first two of as many mixers."""
    monkeypatch.setattr("tools.sharing.model.training_model", lambda *of: (None, None))
    layers = ["mamba", "full_attention", "full_attention", "mlp", "mlp", "mlp"]
    config = NEMOTRON | dict(layers_block_type=layers, intermediate_size=800)
    (rollouts.parent / "config.json").write_text(json.dumps(config))
    # What a norm reads and returns, and an MLP's two products.
    gib = 200 * 3 * 2 * (2 * 8 + 2 * 800) / 2**30
    write_groups(rollouts, a=[(150, 100)] * 2)
    got = report(rollouts, "--activation-gib", str(gib), "--pp", "2")
    # Prompts that stay beside a row keep as much on this stage.
    assert got["recommended_max_tokens"] == 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(text_config="a"), "has text_config='a', must be an object"),
        (dict(text_config=dict(model_type=[1])), "has model_type=[1], must be text"),
        (dict(num_hidden_layers=2**70), "has num_hidden_layers=1180591620717411303424, at most"),
        (dict(num_hidden_layers=10**9), "has num_hidden_layers=1000000000, at most 10000 are"),
    ],
)
def test_descriptions_that_keep_all_else_from_being_read(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    with pytest.raises(ValueError, match=re.escape(named)):
        read_model(tmp_path)


def test_a_description_without_its_own_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | dict(text_config=None)))
    (tmp_path / "plain.json").write_text(json.dumps(HF))
    assert read_model(tmp_path) == read_model(tmp_path / "plain.json")


GATED_DELTA = dict(
    experimental_attention_variant="gated_delta_net",
    linear_attention_freq=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=6)
MAMBA = as_arguments(NEMOTRON, "M-*E")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (EXPERTS | dict(moe_layer_freq=[1]), "moe_layer_freq=[1] must be a whole number from 1"),
        (EXPERTS | dict(moe_layer_freq=[0, 1, 1]), "or a list of 0 or 1 for each of 2 layers"),
        (EXPERTS | dict(moe_layer_freq="([1]*2)"), "moe_layer_freq=([1]*2) must be a whole number"),
        (EXPERTS | dict(moe_router_topk=5), "goes through 5 experts, and there are 4"),
        (GATED_DELTA | dict(linear_attention_freq=[1]), "linear_attention_freq=[1] must be"),
        (GATED_DELTA | dict(linear_attention_freq="[1,0]"), "linear_attention_freq=[1,0] must be"),
        (GATED_DELTA | dict(linear_attention_freq=0), "must be a whole number from 2"),
        (GATED_DELTA | dict(linear_num_key_heads=3), "is no multiple of linear_num_key_heads=3"),
        (GATED_DELTA | dict(linear_key_head_dim=-8), "linear key_dim=-8 must be an integer"),
        (MAMBA | dict(mamba_num_groups=3), "mamba_num_heads=4 is no multiple of mamba_num_gr"),
        (MAMBA | dict(mamba_state_dim="5"), "mamba_state_dim='5' must be an integer of at least 1"),
        (MAMBA | dict(num_experts=None), "has no num_experts, which"),
        ({k: v for k, v in MAMBA.items() if k != "mamba_head_dim"}, "has no mamba_head_dim, which"),
        (GATED_DELTA | dict(linear_attention_freq=None), "linear_attention_freq=None must be"),
    ],
)  # fmt: skip
def test_contradictory_arguments_are_refused(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    (tmp_path / "args.json").write_text(json.dumps(MEGATRON | change))
    with pytest.raises(ValueError, match=re.escape(named)):
        read_model(tmp_path)
