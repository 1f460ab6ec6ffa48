"""Collects the wheels that a machine without a network needs beside its own packages: build/wheels, under 64 MiB.

    python tests/gpu/wheels.py                          # for Python 3.12 on x86-64 Linux
    python tests/gpu/wheels.py --python=3.13 --there jax flax optax orbax-checkpoint transformers torch

What postrain requires (with what that requires in turn), less what the packages that are ``--there`` bring with them,
at the versions of this environment. run.py unpacks those that the machine lacks.
"""

import argparse
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
THERE = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "pyarrow", "jinja2", "requests", "numpy")
MIB = 2**20
LIMIT = 64 * MIB
GLIBC = (17, 24, 27, 28, 31, 34, 35)  # pip takes a wheel only where its platform is named exactly


def list_needed(names: Iterable[str]) -> set[str]:
    """These distributions and all that they require, by canonical name, as far as they are installed here."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        new = [one for one in map(Requirement, required) if one.marker is None or any(map(one.marker.evaluate, extras))]
        waiting += [one for one in new if canonicalize_name(one.name) not in found] if name not in found else []
        found.add(name)
    return found


def read_project() -> list[str]:
    """The dependencies of pyproject.toml that this machine's platform has."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, project["dependencies"])
    return [one.name for one in requirements if one.marker is None or one.marker.evaluate()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "wheels", metavar="FOLDER")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--there", nargs="+", default=list(THERE), metavar="PACKAGE")
    arguments = parser.parse_args()
    missing = sorted(list_needed(read_project()) - list_needed(arguments.there))
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={arguments.python}", "--implementation=cp"]
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in missing]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *options, *platforms, "-d", str(arguments.out), *pins], check=True)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{size / MIB:.1f} MiB in {arguments.out}: {', '.join(pins)}")
    if size > LIMIT:
        raise SystemExit(f"error: expected at most {LIMIT / MIB:.0f} MiB: name more packages that are --there")


if __name__ == "__main__":
    main()
