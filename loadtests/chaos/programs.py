"""The programs that `make chaos` needs beyond the lock: etcd, Redis, Patroni, libfaketime."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests.debian import INSTALL_TIMEOUT_S, install
from services.common.errors import Code, FedmeshError
from services.embedded.accounts import CACHE_ROOT

ROOT: Final = Path(__file__).resolve().parents[2]
# Started by root, Patroni runs as an account that may be kept out of root's home: so it and its Python lie elsewhere.
PATRONI_HOME: Final = (CACHE_ROOT if os.geteuid() == 0 else ROOT / ".cache" / "chaos") / "patroni"
SYSTEM_PYTHON: Final = Path("/usr/bin/python3")
# Debian's names by program.
PACKAGES: Final = {"etcd": "etcd-server", "redis-server": "redis-server"}
FAKETIME_PACKAGE: Final = "faketime"
_FAKETIME: Final = ("/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime", "/usr/lib/faketime")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Programs:
    """faketime: the library to preload, or None where it is missing: clock skew is skipped then, and said so."""

    etcd: Path
    redis: Path
    patroni: Path
    faketime: Path | None


def find_programs(say: Say) -> Programs:
    """Find everything, installing what is missing where that is possible.

    Raises: FedmeshError: CONFIG_INVALID naming the Debian packages that are missing; SERVICE_UNAVAILABLE when Patroni
        cannot be had from PyPI.
    """
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing or _faketime() is None:
        install([*missing, *([FAKETIME_PACKAGE] if _faketime() is None else [])], say, optional=not missing)
    found = {program: shutil.which(program) for program in PACKAGES}
    lacking = [PACKAGES[program] for program, path in found.items() if path is None]
    if lacking:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"make chaos needs {' and '.join(lacking)}: as root, `apt-get install --no-install-recommends "
            f"{' '.join([*lacking, FAKETIME_PACKAGE])}`, or put the programs on PATH",
        )
    return Programs(Path(str(found["etcd"])), Path(str(found["redis-server"])), _patroni(say), _faketime())


def _faketime() -> Path | None:
    return next(
        (Path(home) / "libfaketime.so.1" for home in _FAKETIME if Path(home, "libfaketime.so.1").exists()), None
    )


def _patroni(say: Say) -> Path:
    """Patroni in an environment of its own, which has nothing to do with the lock."""
    requirements = Path(__file__).with_name("requirements.txt").read_bytes()
    stamp, wanted = PATRONI_HOME / ".requirements", hashlib.sha256(requirements).hexdigest()
    program = PATRONI_HOME / "bin" / "patroni"
    if program.exists() and stamp.exists() and stamp.read_text() == wanted:
        return program
    own = ROOT / ".tools" / "bin" / "uv"
    uv = str(own) if own.exists() else shutil.which("uv")
    if uv is None:
        raise FedmeshError(Code.CONFIG_INVALID, "uv is missing: run `make setup` first")
    say(f"installing Patroni from PyPI into {PATRONI_HOME}")
    PATRONI_HOME.parent.mkdir(parents=True, exist_ok=True)
    open_to_all = os.geteuid() == 0 and SYSTEM_PYTHON.exists()
    python = str(SYSTEM_PYTHON) if open_to_all else f"{sys.version_info.major}.{sys.version_info.minor}"
    file = str(Path(__file__).with_name("requirements.txt"))
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", python, str(PATRONI_HOME)],
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(PATRONI_HOME), "-r", file],
    ):
        done = subprocess.run(  # noqa: S603 - uv, no shell
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.split())[-400:]
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"Patroni cannot be installed from PyPI: {said}")
    stamp.write_text(wanted)
    return program
