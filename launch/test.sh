#!/usr/bin/env bash
# Run all checks and tests:  launch/test.sh [--fast] [pytest arguments]
#
# --fast skips slow tests, and tests that need an engine, SLURM or network namespaces. The script stops at the first
# step that fails, and names it. `-n 0` among the pytest arguments runs one test at a time, in this process.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

select=()
if [[ ${1:-} == --fast ]]; then
    select=(-m "not vllm and not slow and not slurm and not netns")
    shift
fi

current=
report_failure() { # STATUS
    (($1 == 0)) || echo "test: FAILED at: $current (exit status $1)" >&2
}
trap 'report_failure $?' EXIT
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

step "mypy"
"$bin/mypy"

scripts=(launch/*.sh launch/*.sbatch .ci/run)
step "bash -n and shellcheck"
for script in "${scripts[@]}"; do bash -n "$script"; done
"$bin/shellcheck" "${scripts[@]}"

step "pytest"
trap - EXIT # pytest reports its failures itself, and its summary must be the last line
# Three tests at a time, since most tests wait for processes; at most two of them with real engines (conftest.py).
exec "$bin/python" -m pytest -n 3 --dist loadgroup "${select[@]}" "$@"
