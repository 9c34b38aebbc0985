#!/usr/bin/env bash
# One node, 8 GPUs. Start the server on GPUs of its own first:
#   VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --port 8000
#   bash examples/grpo_8gpu.sh MODEL [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:?the Hugging Face folder of the model}
shift
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --standalone --nproc-per-node 8 \
    -m megatron_pg.train examples/grpo_8gpu.yaml model.hf="$MODEL" "$@"
