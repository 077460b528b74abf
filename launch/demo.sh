#!/usr/bin/env bash
# Run the demo on a CPU: two ranks answer 512 questions, and five of the answers are shown.
#
#     launch/demo.sh [key=value ...]
#
# A second call finds the run complete. Delete runs/demo to start over, or name another directory: run.dir=DIR.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh cpu
bin=${DPGEN_VENV:-.venv}/bin

export CUDA_VISIBLE_DEVICES=               # the demo is the same everywhere, so a GPU is not used
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default, set here so that it does not warn

run_dir=runs/demo # the default in conf/demo.yaml
for argument in "$@"; do
    [[ $argument != run.dir=* ]] || run_dir=${argument#run.dir=}
done

"$bin/torchrun" --standalone --nproc-per-node 2 -m dpgen run conf/demo.yaml "$@"
echo
"$bin/python" launch/show_demo.py "$run_dir"
