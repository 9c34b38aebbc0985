"""What a machine's GPU makes of the project; ``tools/check_gpu.sh`` is the command."""
