"""What merges passes, as PyTorch operators and as Triton kernels."""
