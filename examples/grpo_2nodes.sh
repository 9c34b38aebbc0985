#!/usr/bin/env bash
# Two nodes. Run the same command on both; the first one meets the others.
#
#   NODE_RANK=0 MASTER_ADDR=host0 bash examples/grpo_2nodes.sh CONFIG [section.key=value ...]
#   NODE_RANK=1 MASTER_ADDR=host0 bash examples/grpo_2nodes.sh CONFIG [section.key=value ...]
#
# Under Slurm one command does both:
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --wrap \
#       "srun bash examples/grpo_2nodes.sh examples/grpo_2nodes.yaml model.hf=MODEL"
#
# NPROC_PER_NODE (default: GPUs of the node, else 1) and NNODES (default 2) change the size.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    NODE_RANK=$SLURM_NODEID
    NNODES=$SLURM_JOB_NUM_NODES
fi
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec ${PYTHON:-python} -m torch.distributed.run \
    --nnodes "${NNODES:-2}" \
    --node-rank "${NODE_RANK:?0 on the first node, 1 on the second}" \
    --nproc-per-node "${NPROC_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}" \
    --master-addr "${MASTER_ADDR:?address of the first node}" \
    --master-port "${MASTER_PORT:-29500}" \
    -m megatron_pg.train "$@"
