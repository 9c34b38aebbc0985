#!/usr/bin/env bash
# Install everything and run the whole suite, as CI does.
#
#   bash tests/run.sh                 every lane
#   LANES=311 bash tests/run.sh       Python 3.11 with megatron-core 0.16: lint, types, every test
#   LANES=312 bash tests/run.sh       Python 3.12 with megatron-core 0.19: Megatron-facing tests, runs, Triton kernels
#   LANES=verl bash tests/run.sh      Python 3.12 with megatron-core 0.18 and verl: its stock engine against ours
#   LANES=between bash tests/run.sh   Python 3.12 with megatron-core 0.17 and 0.18: layers, equivalence, schedule
#
# Environments are kept in .venv-tests-* and reused.
set -euo pipefail
cd "$(dirname "$0")/.."
LANES=${LANES:-"311 312 between verl"}
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

find_python() { # find_python 3.12 -> path of an interpreter of that version, or nothing
    local found
    for found in "python$1" python3; do
        if "$found" -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$1'.split('.'))))" 2>/dev/null; then
            command -v "$found"
            return
        fi
    done
    if command -v pyenv >/dev/null; then
        found=$(pyenv versions --bare | grep -E "^$1\." | tail -1 || true)
        [ -z "$found" ] || echo "$(pyenv prefix "$found")/bin/python"
    fi
}

make_environment() { # make_environment VERSION FOLDER
    local python
    python=$(find_python "$1")
    if [ -z "$python" ]; then
        echo "error: this lane needs Python $1 (python$1 on the PATH, or in pyenv)" >&2
        exit 1
    fi
    [ -x "$2/bin/python" ] || "$python" -m venv "$2"
    "$2/bin/python" -m pip install -q -U pip setuptools wheel
    # Asked for first and alone: the version that has a CPU build, where there is one.
    "$2/bin/python" -m pip install -q "torch==2.13.0"
}

for lane in $LANES; do
    environment=.venv-tests-$lane
    case $lane in
    311)
        echo "== Python 3.11: install"
        make_environment 3.11 "$environment"
        "$environment/bin/python" -m pip install -q -e ".[train,rollout,convert,math,gguf,dev]" "transformers[serving]"
        echo "== Python 3.11: lint and types"
        "$environment/bin/ruff" check .
        "$environment/bin/ruff" format --check .
        "$environment/bin/mypy"
        echo "== Python 3.11: tests"
        "$environment/bin/python" -m pytest -q --durations=15 "$@"
        ;;
    312)
        echo "== Python 3.12: install"
        make_environment 3.12 "$environment"
        "$environment/bin/python" -m pip install -q -e ".[train,dev]"
        echo "== Python 3.12: Megatron-facing tests, runs, Triton kernels"
        "$environment/bin/python" -m pytest -q -m "megatron or triton" --durations=10 \
            tests/mcore tests/attention tests/parallel tests/train/test_runs.py "$@"
        ;;
    between)
        environment=.venv-tests-312
        echo "== Python 3.12: install"
        make_environment 3.12 "$environment"
        "$environment/bin/python" -m pip install -q -e ".[train,dev]"
        for version in 0.17.1 0.18.2; do
            echo "== Python 3.12: megatron-core $version"
            # Found before the environment's own, whose dependencies serve it, too.
            core=$environment/megatron-core-$version
            [ -d "$core" ] || "$environment/bin/python" -m pip install -q --no-deps --target "$core" "megatron-core==$version"
            PYTHONPATH=$PWD/$core "$environment/bin/python" -m pytest -q -m megatron --durations=5 \
                tests/mcore tests/parallel --megatron-core "$version" "$@"
        done
        ;;
    verl)
        environment=.venv-tests-verl
        echo "== verl: install"
        make_environment 3.12 "$environment"
        # verl's own requirements name no versions that fit each other on a CPU; these do.
        "$environment/bin/python" -m pip install -q -e . "megatron-core==0.18.2" \
            "tensordict>=0.8,<=0.10" "transformers>=4.56,<5.11" "TransferQueue>=0.1.10" \
            omegaconf hydra-core codetiming peft accelerate ray psutil einops dill pybind11 pandas pyarrow orjson \
            cachetools datasets torchdata pylatexenc pyzmq msgspec tensorboard uvicorn fastapi rich \
            "pytest>=8" "hypothesis>=6.100"
        "$environment/bin/python" -m pip install -q --no-deps "verl==0.9.1"
        echo "== verl: its engine against ours"
        "$environment/bin/python" -m pytest -q -m verl --megatron-core 0.18.2 --durations=5 tests/adapters "$@"
        ;;
    *)
        echo "error: LANES=$lane is unknown; use one or several of 311, 312, between, verl" >&2
        exit 2
        ;;
    esac
done
