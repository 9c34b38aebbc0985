"""Rollouts of an agent as many rows that share their contexts, equal to the rows written out.

``torchrun --standalone --nproc-per-node 2 examples/agent_forest.py tp2`` (or pp2, dp2)
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
from megatron_pg.grpo import GrpoConfig, GrpoStep, total_over_replicas

TP, PP = 1 + ("tp2" in sys.argv), 1 + ("pp2" in sys.argv)
VOCAB, GROUPS, ROLLOUTS, TURNS = 64, 2, 4, 5


def words(count):
    """Random tokens."""
    return torch.randint(VOCAB, (count,)).tolist()


def rollout(name, reward, system, task, helper):
    """A row for each turn of the agent and of its sub-agent, and one for the compacted context."""
    rows, context = [], system + task
    for turn in range(TURNS):
        said, tool = words(12), words(20)
        rows.append((context, said, 12 * [1]))
        if turn == 2:  # the tool is a sub-agent with a prompt of its own, two turns long
            call = helper + words(8)
            for _ in range(2):
                rows.append((call, tool := words(16), 16 * [1]))
                call = call + tool + words(4)
        context = context + said + tool
    # The context goes on from a summary; the tool's answer within it is real and not trained.
    rows.append((system + words(24), words(40), 10 * [1] + 20 * [0] + 10 * [1]))
    for prompt, response, mask in rows:
        tokens = dict(prompt_ids=torch.tensor(prompt), response_ids=torch.tensor(response))
        mask = torch.tensor(mask, dtype=torch.bool)
        yield Sample(**tokens, loss_mask=mask, reward=reward, rollout_id=name)


def forest(name):
    """A group: what its rows share is found in their tokens."""
    common = words(64), words(24), words(48)
    rewards = torch.rand(ROLLOUTS, dtype=torch.float64).tolist()
    rows = [row for i, r in enumerate(rewards) for row in rollout(str(i), r, *common)]
    return Group(name, tuple(rows))


def weighted_rows(groups):
    """Every row with its tokens' weight: a mean over rollouts of means over a rollout's tokens."""
    for group in groups:
        rewards, counts = dict.fromkeys(s.rollout_id for s in group.samples), {}
        for sample in group.samples:
            rewards[sample.rollout_id] = sample.reward
            counts[sample.rollout_id] = counts.get(sample.rollout_id, 0) + sample.num_loss_tokens
        each = torch.tensor(list(rewards.values()), dtype=torch.float64)
        for s in group.samples:
            advantage = (s.reward - float(each.mean())) / (float(each.std()) + 1e-6)
            yield s, advantage / counts[s.rollout_id] / (ROLLOUTS * GROUPS)


def build(is_packed):
    """A Megatron GPT; the stock model has the stock spec."""
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2,
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
    model = kind(config, spec, VOCAB, 512, mpu.is_pipeline_first_stage(),
                 mpu.is_pipeline_last_stage(), position_embedding_type="rope")  # fmt: skip
    ddp = mdist.DistributedDataParallelConfig()
    return mdist.DistributedDataParallel(config, ddp, model.double())


def written_out_backward(rows, model):
    """Loss and gradients of the stock model, a microbatch for every row."""

    def forward_step(data, model):
        sample, weight = next(data)
        tokens = torch.cat([sample.tokens, torch.zeros(len(sample.tokens) % TP, dtype=torch.int64)])
        mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)

        def loss_func(logits):
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)[0]
            own = logits[len(sample.prompt_ids) - 1 : len(sample.tokens) - 1].log_softmax(-1)
            logprobs = own.gather(1, sample.response_ids[:, None])[:, 0][sample.loss_mask]
            loss = -weight * (logprobs - logprobs.detach()).exp().sum()
            return loss, torch.tensor(0, dtype=torch.int), {"loss": float(loss)}

        return model(tokens[None], torch.arange(len(tokens))[None], mask), loss_func

    model.zero_grad_buffer()
    results = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(rows), model=model,
        num_microbatches=len(rows), seq_length=512, micro_batch_size=1,
        forward_only=False)  # fmt: skip
    return {"loss": sum(result["loss"] for result in results)}


if __name__ == "__main__":
    with mcore.cpu.emulate_cuda():
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel(TP, PP)
        tensor_parallel.random.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
        packed, stock = build(True), build(False)
        torch.manual_seed(0)
        groups = [forest(str(i)) for i in range(GROUPS)]
        rank, dp = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        algorithm = GrpoConfig(loss_agg_mode="seq-mean-token-mean")
        step = GrpoStep([packed], vocab_size=VOCAB, algorithm=algorithm)
        batch = step.prepare({i: g for i, g in enumerate(groups) if i % dp == rank})
        loss = total_over_replicas(step.backward(batch), step.ranks).get("loss")
        rows = list(weighted_rows(groups))[rank::dp]
        want = total_over_replicas(written_out_backward(rows, stock), step.ranks).get("loss")
        both = zip(packed.parameters(), stock.parameters())
        worst = max(float((p.main_grad - q.main_grad).norm() / q.main_grad.norm()) for p, q in both)
        assert worst < 1e-10 and (loss is None or abs(loss - want) < 1e-12), (worst, loss, want)
        told = f"{batch.tokens.logical:,} tokens written out, {batch.tokens.unique:,} encoded"
        print(f"{len(batch.shape.rewards)} rows: {told}; gradients differ by {worst:.0e}")
