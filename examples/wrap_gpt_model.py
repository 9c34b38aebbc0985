"""A Megatron GPT on packed groups equals the stock GPT on written-out samples, shown on two ranks.

    torchrun --standalone --nproc-per-node 2 examples/wrap_gpt_model.py

TP=2 with sequence parallelism, on gloo and the CPU of a machine without CUDA. Trains both for a few
steps with Megatron's optimizer and compares loss and every gradient at each step.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import (
    PrefixGroupedSeqParams,
    count_attention_calls,
    cpu,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)

VOCAB, PROMPT, RESPONSE, NUM_GENERATIONS, GROUPS, STEPS = 256, 96, 32, 8, 2, 3


def build(wrapped: bool):
    """The stock model, or the same model with its spec wrapped in one line."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        **cpu.transformer_config_defaults(),
    )
    spec = with_sequence_parallel_norms(get_gpt_layer_local_spec(normalization="RMSNorm"), config)
    if wrapped:
        spec = with_prefix_grouped_attention(spec)  # the one line
    torch.manual_seed(0)
    model = GPTModel(
        config, spec, vocab_size=VOCAB, max_sequence_length=512, position_embedding_type="rope"
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, adam_eps=1e-3), [model]
    )
    return model, optimizer


def sum_of_losses(logits, targets):
    """Summed negative logprobs of the targets; logits ``[n, vocab / tp]``."""
    losses = vocab_parallel_cross_entropy(logits[:, None].contiguous(), targets[:, None])
    return losses.sum()


def packed_step(batches, model):
    """One row that holds whole groups, every prompt once."""
    layout, samples = next(batches)
    tokens = layout.pack_tokens(samples)
    params = PrefixGroupedSeqParams.from_layout(layout, torch.cuda.current_device())
    logits = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)

    def loss_func(logits):
        # One prediction per (sample, response token), read from the packed row.
        responses = [layout.sample_indices(i)[PROMPT:] for i in range(layout.num_samples)]
        targets = torch.cat(responses)
        loss = sum_of_losses(logits[0][layout.predictor_of[targets]], tokens[targets])
        return loss, torch.tensor(len(targets), dtype=torch.int), {"loss": loss.detach()}

    return logits, loss_func


def written_out_step(batches, model):
    """One row per sample, the prompt repeated in each."""
    sample = next(batches)
    n = len(sample)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
    logits = model(sample[None], torch.arange(n)[None], mask)

    def loss_func(logits):
        loss = sum_of_losses(logits[0, PROMPT - 1 : -1], sample[PROMPT:])
        return loss, torch.tensor(n - PROMPT, dtype=torch.int), {"loss": loss.detach()}

    return logits, loss_func


def run(step, batches, model):
    """Forward and backward through Megatron's schedule; the summed loss."""
    model.zero_grad_buffer()
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=PROMPT + RESPONSE,
        micro_batch_size=1,
        forward_only=False,
    )
    return float(sum(result["loss"] for result in results))


def main():
    """Train both models side by side."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    packed, packed_optimizer = build(wrapped=True)
    stock, stock_optimizer = build(wrapped=False)
    unique = logical = 0
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        rows, samples = [], []
        for _ in range(GROUPS):
            prompt = torch.randint(0, VOCAB, (PROMPT,), generator=generator)
            responses = torch.randint(0, VOCAB, (NUM_GENERATIONS, RESPONSE), generator=generator)
            group = [torch.cat([prompt, response]) for response in responses]
            tree = PrefixTree.from_group(PROMPT, [RESPONSE] * NUM_GENERATIONS)
            rows.append((pack_trees([tree], pad_to_multiple=2), group))
            samples += group
        unique += sum(layout.unique_tokens for layout, _ in rows)
        logical += sum(layout.logical_tokens for layout, _ in rows)
        loss = run(packed_step, rows, packed)
        control = run(written_out_step, samples, stock)
        worst = max(
            float((a.main_grad - b.main_grad).norm() / b.main_grad.norm())
            for a, b in zip(packed.parameters(), stock.parameters())
        )
        torch.testing.assert_close(loss, control, rtol=1e-5, atol=0.0)
        assert worst < 1e-4, worst
        for optimizer in (packed_optimizer, stock_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {number + 1}: loss packed {loss:.4f}, written out {control:.4f}; ", end="")
            print(f"largest relative difference of a gradient {worst:.1e}", flush=True)
    if dist.get_rank() == 0:
        calls = count_attention_calls(packed)
        print(
            f"tokens: {logical:,} written out, {unique:,} encoded ({logical / unique:.2f}x fewer)"
        )
        print(f"attention calls: {calls.prefix_grouped} prefix-grouped, {calls.ordinary} ordinary")
    dist.destroy_process_group()


if __name__ == "__main__":
    with cpu.emulate_cuda():
        main()
