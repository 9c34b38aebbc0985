"""GRPO in a loop of one's own, equal to the written-out loop with the stock spec.

``torchrun --standalone --nproc-per-node 2 examples/own_loop.py tp2`` (or pp2)
"""

import sys

import torch
from megatron.core import distributed as mdist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as layer_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pg import mcore
from megatron_pg.data import Group, Sample
from megatron_pg.grpo import GrpoStep

TP, PP = (1, 2) if "pp2" in sys.argv else (2, 1)
VOCAB, PROMPT, RESPONSE, SAMPLES, GROUPS = 64, 24, 8, 6, 3


def build(is_packed):
    """A Megatron GPT and an optimizer."""
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2,
        tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP, sequence_parallel=TP > 1,
        params_dtype=torch.float64, pipeline_dtype=torch.float64, variable_seq_lengths=PP > 1,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm",
        moe_token_dispatcher_type="alltoall", calculate_per_token_loss=True,
        finalize_model_grads_func=mdist.finalize_model_grads,
        **mcore.cpu.transformer_config_defaults(),
    )  # fmt: skip
    spec = mcore.with_sequence_parallel_norms(layer_spec(normalization="RMSNorm"), config)
    wrapped = mcore.with_prefix_grouped_attention(spec), mcore.PrefixGroupedGPTModel
    spec, kind = wrapped if is_packed else (spec, GPTModel)
    torch.manual_seed(mpu.get_pipeline_model_parallel_rank())
    model = kind(config, spec, VOCAB, 64, mpu.is_pipeline_first_stage(),
                 mpu.is_pipeline_last_stage(), position_embedding_type="rope")  # fmt: skip
    ddp = mdist.DistributedDataParallelConfig()
    model = mdist.DistributedDataParallel(config, ddp, model.double())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)


def rollouts(seed):
    """Random groups; the reward is the share of even tokens."""
    torch.manual_seed(seed)
    for name in map(str, range(GROUPS)):
        prompt, answers = torch.randint(VOCAB, (PROMPT,)), torch.randint(VOCAB, (SAMPLES, RESPONSE))
        mask, even = torch.ones(RESPONSE, dtype=torch.bool), (answers % 2 == 0).double().mean(1)
        yield Group(name, tuple(Sample(prompt_ids=prompt, response_ids=a, reward=r, loss_mask=mask)
                                for a, r in zip(answers, even.tolist())))  # fmt: skip


def written_out_backward(groups, model):
    """The same step with the stock model: a microbatch for every sample, the prompt in each."""
    rewards = torch.stack([group.rewards for group in groups])
    advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)
    samples = [sample.tokens for group in groups for sample in group.samples]

    def forward_step(data, model):
        tokens, advantage = next(data)
        mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)

        def loss_func(logits):
            own = logits[0, PROMPT - 1 : -1, None].contiguous()
            logprobs = -tensor_parallel.vocab_parallel_cross_entropy(own, tokens[PROMPT:, None])
            loss = -((logprobs - logprobs.detach()).exp() * advantage).mean() / len(samples)
            return loss, torch.tensor(0, dtype=torch.int), {}

        return model(tokens[None], torch.arange(len(tokens))[None], mask), loss_func

    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=zip(samples, advantages.flatten()),
        model=model, num_microbatches=len(samples), seq_length=PROMPT + RESPONSE,
        micro_batch_size=1, forward_only=False)  # fmt: skip


if __name__ == "__main__":
    with mcore.cpu.emulate_cuda():
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel(TP, PP)
        tensor_parallel.random.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
        (packed, optimizer), (stock, control) = build(True), build(False)
        step = GrpoStep([packed], vocab_size=VOCAB)
        for number in range(3):
            step.backward(batch := step.prepare(groups := list(rollouts(number))))
            written_out_backward(groups, stock)
            for model, own in ((packed, optimizer), (stock, control)):
                for parameter in model.parameters():
                    parameter.grad = parameter.main_grad
                own.step()
                own.zero_grad()
            both = zip(packed.parameters(), stock.parameters())
            worst = max(float((p - q).data.norm() / q.data.norm()) for p, q in both)
            assert worst < 1e-6, worst  # Megatron's cross entropy is fp32
            print(f"{batch.tokens.logical / batch.tokens.unique:.2f}x, differ by {worst:.0e}")
