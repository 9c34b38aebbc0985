"""What reads logits and makes their gradient, as PyTorch operators and as Triton kernels."""
