"""On one rank: a group that trains within a memory limit in which its packed row does not fit."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from megatron_pg.data import Group, Sample
from megatron_pg.grpo import GrpoStep, PrefixGroupConfig
from megatron_pg.train import TrainConfig, parallel_run
from megatron_pg.train.config import ModelConfig
from megatron_pg.train.model import build_trained_model
from megatron_pg.train.model.plan import plan_model

VOCAB = 64
MODEL = ModelConfig(
    vocab_size=VOCAB,
    max_position_embeddings=8192,
    transformer={
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
    },
)


def make_group(prompt_len: int, response_len: int, num_samples: int) -> Group:
    prompt = torch.randint(0, VOCAB, (prompt_len,))
    samples = (
        Sample(
            prompt_ids=prompt,
            response_ids=torch.randint(0, VOCAB, (response_len,)),
            reward=float(i),
            loss_mask=torch.ones(response_len, dtype=torch.bool),
        )
        for i in range(num_samples)
    )
    return Group("large", tuple(samples))


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def train(way: str, megabytes: int) -> float:
    """The largest gradient of a step that may add so much to the address space of the process.

    Args:
        way: "resident", or "row" for the whole group as one row.
        megabytes: of address space.
    """
    config = TrainConfig(model=MODEL)
    with parallel_run(config.parallel, 0):
        model = build_trained_model(config, plan_model(config.model, config.parallel), 1)

        def step(group: Group, max_tokens: int) -> float:
            settings = PrefixGroupConfig(
                max_tokens_per_microbatch=max_tokens,
                prefix_resident="always",
                max_resident_tokens=4096,
                logprob_chunk_tokens=512,
            )
            own = GrpoStep(model.chunks, vocab_size=VOCAB, settings=settings)
            batch = own.prepare([group])
            assert bool(batch.tokens.resident) == (max_tokens < 30_000)
            return own.backward(batch)["loss"]

        # Whatever a step sets up once.
        step(make_group(64, 16, 4), 72)
        group = make_group(4096, 512, 64)
        limit = address_space() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        step(group, 4096 if way == "resident" else 4096 + 64 * 512)
        return max(float(p.main_grad.abs().max()) for p in model.chunks[0].parameters())
