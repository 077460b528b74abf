#!/usr/bin/env bash
# The demo, on a CPU and in a few minutes: two ranks answer 512 questions, and five of the answers are shown.
#
#     launch/demo.sh [key=value ...]
#
# Run it again and it finds its run finished; delete runs/demo to start over, or name another folder: run.dir=DIR.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh cpu
bin=${DPGEN_VENV:-.venv}/bin

export CUDA_VISIBLE_DEVICES=               # the demo is the same everywhere: no GPU, even where there is one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own choice, made aloud so that it does not warn

run_dir=runs/demo # as conf/demo.yaml has it
for argument in "$@"; do
    [[ $argument != run.dir=* ]] || run_dir=${argument#run.dir=}
done

"$bin/torchrun" --standalone --nproc-per-node 2 -m dpgen run conf/demo.yaml "$@"
echo
"$bin/python" launch/show_demo.py "$run_dir"
