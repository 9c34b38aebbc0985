"""Attention over one prompt and its responses, without Megatron: the prompt is computed once."""

import torch

from megatron_pg import PrefixTree, available_backends, pack_trees, prefix_grouped_attention
from megatron_pg.attention import AttentionInputs

# One prompt of 5 tokens, two responses of 3 and 2 tokens, packed in one row of 10 tokens.
layout = pack_trees([PrefixTree.from_group(prefix_len=5, suffix_lens=[3, 2])])
q = torch.randn(layout.total_tokens, 8, 64, requires_grad=True)
k, v = (torch.randn(layout.total_tokens, 2, 64, requires_grad=True) for _ in range(2))
out = prefix_grouped_attention(q, k, v, layout)
out.square().sum().backward()

# The same as causal attention over each written-out sample.
for sample in range(layout.num_samples):
    rows = layout.sample_indices(sample)
    alone = torch.nn.functional.scaled_dot_product_attention(
        *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out[rows], alone)

print(f"backends for these inputs: {', '.join(available_backends(AttentionInputs.of(q, k)))}")
print(f"{layout.logical_tokens} logical tokens, {layout.unique_tokens} computed")
