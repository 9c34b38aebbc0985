#!/usr/bin/env bash
# Install everything and run the whole suite, as CI does.
#
#   bash tests/run.sh                 every lane: the first beside the others, whose output follows
#   LANES=311 bash tests/run.sh       Python 3.11 with megatron-core 0.16: lint, types, every test
#   LANES=312 bash tests/run.sh       Python 3.12 with megatron-core 0.19: Megatron-facing tests, runs, Triton kernels,
#                                     and steps on a CUDA device that is not there, for builds of PyTorch that have CUDA
#   LANES=verl bash tests/run.sh      Python 3.12 with megatron-core 0.18 and verl: its stock engine against ours
#   LANES=between bash tests/run.sh   Python 3.12 with megatron-core 0.17 and 0.18: layers, equivalence, schedule
#
# Environments are kept in .venv-tests-* and reused.
set -euo pipefail
cd "$(dirname "$0")/.."
LANES=${LANES:-"311 312 between verl"}
# Two lanes run side by side, and ranks take one thread each anyway.
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

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
    # Asked for first and alone: the version that has a CPU build, where there is one. Builds with CUDA take 3 GB to
    # load, which pip would keep a second time.
    "$2/bin/python" -m pip install -q --no-cache-dir "torch==2.13.0"
}

borrow() { # borrow FROM FOLDER: packages that FOLDER lacks are found in FROM, as with --system-site-packages
    local from
    from=$("$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    [ -x "$2/bin/python" ] || "$1/bin/python" -m venv "$2"
    echo "$from" >"$("$2/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
}

install() { # install LANE
    local environment=.venv-tests-$1
    echo "== $1: install"
    case $1 in
    311)
        make_environment 3.11 "$environment"
        "$environment/bin/python" -m pip install -q -e ".[train,rollout,convert,math,gguf,dev]" "transformers[serving]"
        ;;
    312 | between)
        environment=.venv-tests-312
        make_environment 3.12 "$environment"
        "$environment/bin/python" -m pip install -q -e ".[train,dev]"
        # Kernels that tests run in Triton's interpreter; apart, since transformers would call them on the CPU.
        kernels=$environment/recurrent-kernels
        [ -d "$kernels" ] || MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "$environment/bin/python" -m pip install \
            -q --no-deps --no-build-isolation --target "$kernels" \
            flash-linear-attention==0.6.0 fla-core==0.6.0 mamba-ssm==2.3.2.post1
        ;;
    verl)
        # A second copy of PyTorch would take 5 GB.
        make_environment 3.12 .venv-tests-312
        borrow .venv-tests-312 "$environment"
        # verl's own requirements name no versions that fit each other on a CPU; these do.
        "$environment/bin/python" -m pip install -q -e . "megatron-core==0.18.2" \
            "tensordict>=0.8,<=0.10" "transformers>=4.56,<5.11" "TransferQueue>=0.1.10" \
            omegaconf hydra-core codetiming peft accelerate ray psutil einops dill pybind11 pandas pyarrow orjson \
            cachetools datasets torchdata pylatexenc pyzmq msgspec tensorboard uvicorn fastapi rich \
            "pytest>=8" "hypothesis>=6.100"
        "$environment/bin/python" -m pip install -q --no-deps "verl==0.9.1"
        ;;
    esac
}

check() { # check LANE [pytest's arguments]
    local lane=$1 environment=.venv-tests-$1
    shift
    case $lane in
    311)
        echo "== Python 3.11: lint and types"
        "$environment/bin/ruff" check .
        "$environment/bin/ruff" format --check .
        "$environment/bin/mypy"
        echo "== Python 3.11: tests"
        "$environment/bin/python" -m pytest -q --durations=15 "$@"
        ;;
    312)
        echo "== Python 3.12: Megatron-facing tests, runs, Triton kernels"
        families=tests/train/test_families.py::test_five_steps_end_where_a_plain_loop_ends
        "$environment/bin/python" -m pytest -q -m "megatron or triton" --durations=10 \
            tests/mcore tests/attention tests/parallel tests/fake_h100 tests/train/test_runs.py \
            tests/checkpoint/test_nemotron_h.py tests/train/test_hybrid_experts.py tests/train/test_hybrid_runs.py \
            "tests/grpo/test_routes.py::test_a_step_equals_samples_written_out_with_their_routes[hybrid_pp2]" \
            "$families"[{nemotron_h-pp2,nemotron_h_moe-pp2,nemotron_h-cp2,qwen3_next-cp2}] "$@"
        echo "== Python 3.12: dry runs of hybrids"
        "$environment/bin/python" -m pytest -q -k hybrid tests/train/test_dry_run.py tests/train/test_layer_memory.py
        ;;
    between)
        environment=.venv-tests-312
        for version in 0.17.1 0.18.2; do
            echo "== Python 3.12: megatron-core $version"
            # Found before the environment's own, whose dependencies serve it, too.
            core=$environment/megatron-core-$version
            [ -d "$core" ] || "$environment/bin/python" -m pip install -q --no-deps --target "$core" "megatron-core==$version"
            # Layouts of four ranks, what is frozen and many steps are for the versions at both ends.
            PYTHONPATH=$PWD/$core "$environment/bin/python" -m pytest -q -m megatron --durations=5 \
                -k "not frozen and not pp4 and not tp4 and not dp4 and not cp4 and not cp2_ and not twenty" \
                tests/mcore tests/parallel --megatron-core "$version" "$@"
        done
        ;;
    verl)
        echo "== verl: its engine against ours"
        "$environment/bin/python" -m pytest -q -m verl --megatron-core 0.18.2 --durations=5 tests/adapters "$@"
        ;;
    esac
}

read -r -a lanes <<<"$LANES"
for lane in "${lanes[@]}"; do
    case $lane in
    311 | 312 | between | verl) ;;
    *)
        echo "error: LANES=$lane is unknown; use one or several of 311, 312, between, verl" >&2
        exit 2
        ;;
    esac
done
first=${lanes[0]} others=${lanes[*]:1}
install "$first" # alone: installs write the same metadata into the checkout
if [ -z "$others" ]; then
    check "$first" "$@"
    exit
fi
log=$(mktemp)
trap 'trap - INT TERM; kill 0' INT TERM
(
    # Not joined by &&, under which a failing line within would not end them.
    for lane in $others; do
        install "$lane"
        check "$lane" "$@"
    done
) >"$log" 2>&1 &
beside=$! status=0
(check "$first" "$@") &
wait $! || status=$?
echo "== waiting for $others"
wait "$beside" || status=$?
cat "$log"
rm "$log"
exit "$status"
