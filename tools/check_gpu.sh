#!/usr/bin/env bash
# Check and measure this machine's GPU in one command, within nine minutes on one card.
#
#   bash tools/check_gpu.sh [OUT]           # default: runs/check_gpu; writes check_gpu.{md,json,log} there
#   bash tools/check_gpu.sh --quick         # tiny shapes, on a CPU too: does everything run?
#   bash tools/check_gpu.sh --only step,layer --seconds 300
#
# Says first what is missing and what is left out for it. Nothing is installed or fetched: packages that
# are elsewhere go on PYTHONPATH, another interpreter is PYTHON=..., and a copy of the repository without
# its history is told its COMMIT=... How the results are read: tools/bench/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m tools.check_gpu "$@"
