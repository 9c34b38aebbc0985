"""A loaded model must give what transformers gives, on ordinary batches and packed groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.checkpoint import load_hf, read_hf_config
from megatron_pg.mcore import Predictions, PrefixGroupedSeqParams
from tests.checkpoint import tiny
from tests.checkpoint.tiny import Layout
from tests.utils import assert_close

BOUND = 1e-5
# Samples that ordinary batches hold: the longest, and one whose length ranks divide unevenly.
ALONE = (1, 5)


def sequences(vocab: int) -> list[Tensor]:
    """Two prompts, with four and two responses of several lengths."""
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> Tensor:
        return torch.randint(0, vocab, (count,), generator=generator)

    groups = [(tokens(21), (5, 9, 1, 3)), (tokens(13), (8, 2))]
    return [torch.cat([prompt, tokens(n)]) for prompt, counts in groups for n in counts]


def of_transformers(root: Path, name: str) -> Path:
    """A file of the logprobs ``[L - 1, vocab_size]`` of every next token, per sample."""
    path, file = root / name, root / f"{name}-logprobs.pt"
    if not file.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        )
        samples = sequences(model.config.vocab_size)
        with torch.no_grad():
            found = [model(sample[None]).logits[0, :-1].log_softmax(-1) for sample in samples]
        torch.save(found, file)
    return file


def run(chunks: list[Any], batches: list[dict[str, Any]], layout: Layout) -> list[Any]:
    """Outputs of the last stage, one per batch; empty elsewhere."""
    outputs: list[Any] = []

    def step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        output = model(batch["tokens"], batch["position_ids"], batch["mask"], **batch["kwargs"])

        def loss_func(output: Any) -> Any:
            outputs.append(output)
            zero = torch.zeros(())
            return zero, torch.ones((), dtype=torch.int), {"loss": zero}

        return output, loss_func

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=chunks[0],
            num_microbatches=len(batches),
            seq_length=128,
            micro_batch_size=1,
            forward_only=True,
        )
    return outputs


def ordinary(samples: list[Tensor], layout: Layout) -> list[dict[str, Any]]:
    batches = []
    for sample in samples:
        tokens = torch.cat([sample, sample.new_zeros(-len(sample) % layout.tp)])
        n = len(tokens)
        mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
        ids = torch.arange(n)[None]
        batches.append(dict(tokens=tokens[None], position_ids=ids, mask=mask, kwargs={}))
    return batches


def packed(samples: list[Tensor], layout: Layout, vocab: int) -> tuple[Any, dict[str, Any]]:
    trees = [
        PrefixTree.from_sequences([s.tolist() for s in group])
        for group in (samples[:4], samples[4:])
    ]
    row = pack_trees(trees, pad_to_multiple=layout.tp)
    assert row.reuse_ratio > 1.5
    tokens = row.pack_tokens(samples)
    predictions = Predictions(
        predictor_ids=row.predictor_ids,
        target_tokens=tokens[row.target_ids],
        vocab_size=vocab,
    )
    params = PrefixGroupedSeqParams.from_layout(row, "cpu", predictions=predictions)
    batch = dict(
        tokens=tokens[None],
        position_ids=params.position_ids[None],
        mask=None,
        kwargs=dict(packed_seq_params=params),
    )
    return row, batch


def check(root: Path, name: str, layout: Layout) -> int:
    """Samples compared, on ranks of the last stage; this runs on every rank."""
    path = root / name
    model = read_hf_config(path)
    chunks = tiny.build(model, layout)
    load_hf(chunks, path)
    samples = sequences(model.vocab_size)
    want = torch.load(of_transformers(root, name))
    rows = run(chunks, ordinary([samples[i] for i in ALONE], layout), layout)
    row, batch = packed(samples, layout, model.vocab_size)
    result = run(chunks, [batch], layout)
    if not parallel_state.is_pipeline_last_stage():
        return 0
    for i, logits in zip(ALONE, rows, strict=True):
        full = gather_from_tensor_model_parallel_region(logits)[0, : len(samples[i]) - 1]
        got = full[:, : model.vocab_size].log_softmax(-1)
        assert_close("ordinary", got, want[i], BOUND)
    by_edge = {
        (int(p), int(t)): logprob
        for p, t, logprob in zip(row.predictor_ids, row.target_ids, result[0][0])
    }
    for i, (sample, logprobs) in enumerate(zip(samples, want)):
        path_ids = row.sample_indices(i).tolist()
        got = torch.stack([by_edge[edge] for edge in zip(path_ids, path_ids[1:])])
        assert_close("packed", got, logprobs.gather(1, sample[1:, None])[:, 0], BOUND)
    return len(samples)
