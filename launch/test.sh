#!/usr/bin/env bash
# Run all checks and tests:  launch/test.sh [--fast | --gpu] [pytest arguments]
#
# --gpu installs vLLM's build for GPUs, and runs tests/gpu alone. A test that needs more GPUs than there are is skipped,
# with the reason.
# --fast skips slow tests, and tests that need an engine, SLURM or network namespaces. The script stops at the first step
# that fails, and names it; mypy runs beside the tests, and what it finds comes last. `-n 0` among the pytest arguments
# runs one test at a time, in this process.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Without bytecode on disk, each of the many processes that tests start would compile dpgen again.
unset PYTHONDONTWRITEBYTECODE

if [[ ${1:-} == --gpu ]]; then
    shift
    bash launch/install.sh gpu --dev
    # The tests share the GPUs among themselves (tests/helpers/gpus.py). An engine that starts needs about four cores.
    workers=$(($(nproc) / 4))
    workers=$((workers < 1 ? 1 : workers > 16 ? 16 : workers))
    exec "${DPGEN_VENV:-.venv}/bin/python" -m pytest tests/gpu -n "$workers" --dist worksteal "$@"
fi

workers=4
select=()
if [[ ${1:-} == --fast ]]; then
    workers=3
    select=(-m "not vllm and not slow and not slurm and not netns")
    shift
fi

current=
types= # what mypy writes while it runs beside pytest
# shellcheck disable=SC2329 # the trap calls it
finish() { # STATUS
    (($1 == 0)) || [[ -z $current ]] || echo "test: FAILED at: $current (exit status $1)" >&2
    [[ -z $types ]] || { kill "$mypy" 2>/dev/null || true; }
    rm -f "$types"
}
trap 'finish $?' EXIT
step() {
    current=$1
    echo "== $current"
}

step "install"
bash launch/install.sh cpu --dev
bin=${DPGEN_VENV:-.venv}/bin

step "ruff check"
"$bin/ruff" check .

step "ruff format (repair with: ruff format .)"
"$bin/ruff" format --check .

# mypy takes one core for a minute or two, and some of the first tests (SLURM's) mostly wait.
types=$(mktemp)
"$bin/mypy" >"$types" 2>&1 &
mypy=$!

scripts=(launch/*.sh launch/*.sbatch .ci/run)
step "bash -n and shellcheck"
for script in "${scripts[@]}"; do bash -n "$script"; done
"$bin/shellcheck" "${scripts[@]}"

# pytest reports its failures itself, and its summary is the last line unless mypy finds something.
# Four tests at a time, since most tests wait for processes; at most two of them with real engines (conftest.py). The
# quick ones wait less, and a fourth process would import everything for nothing.
step "pytest, and mypy beside it"
status=0
"$bin/python" -m pytest -n "$workers" --dist loadgroup "${select[@]}" "$@" || status=$?
current=mypy
wait "$mypy" || { cat "$types" && exit 1; }
current=
exit "$status"
