#!/usr/bin/env bash
# Install everything and train a small real model by GRPO on the CPU, in minutes.
#
#   bash examples/quickstart.sh [--out DIR] [section.key=value ...]
#
# Writes DIR/metrics.jsonl, DIR/summary.json and DIR/reward.png (default runs/quickstart).
# The environment is kept in .venv, the model in .cache; both are reused.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=runs/quickstart
if [ "${1:-}" = "--out" ]; then
    OUT=${2:?--out needs a folder}
    shift 2
fi
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ ! -x .venv/bin/python ]; then
    echo "== creating .venv"
    "$PYTHON" -m venv .venv
fi
if ! .venv/bin/python -c "import megatron_pg.train, gguf, reasoning_gym" 2>/dev/null; then
    echo "== installing (a few minutes the first time)"
    .venv/bin/python -m pip install -q -U pip setuptools wheel
    .venv/bin/python -m pip install -q "torch==2.13.0"
    .venv/bin/python -m pip install -q -e ".[train,rollout,gguf]"
fi
MODEL=.cache/SmolLM2-135M-Instruct
if [ ! -f "$MODEL/config.json" ]; then
    echo "== preparing SmolLM2-135M-Instruct (93 MB, once)"
    mkdir -p .cache
    .venv/bin/python examples/prepare_smollm2.py --out "$MODEL"
fi

echo "== training on two processes, one pipeline stage each"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > 1 ? $(nproc) / 2 : 1))}
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_pg.train examples/quickstart.yaml model.hf="$MODEL" run.out="$OUT" "$@"
echo "== wrote $OUT/metrics.jsonl, $OUT/summary.json, $OUT/reward.png"
