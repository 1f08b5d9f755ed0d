"""A virtual environment for each peer, in .cache/peers, made with uv from pinned requirements."""

import contextlib
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from loadtests.peers.settings import Tell
from services.common.errors import Code, FedmeshError

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / ".cache" / "peers"
INSTALL_TIMEOUT_S: Final = 900.0


def prepare(peer: str, tell: Tell, requirements: Path | None = None) -> Path:
    """The peer's environment; made, or made anew when its requirements have changed.

    requirements: the file with them; the peer's own beside this module by default.

    Raises:
        FedmeshError: CONFIG_INVALID without uv; SERVICE_UNAVAILABLE if packages cannot be had.
    """
    home, requirements = CACHE / peer, requirements or Path(__file__).parent / peer / "requirements.txt"
    stamp, wanted = home / ".requirements", hashlib.sha256(requirements.read_bytes()).hexdigest()
    with contextlib.suppress(FileNotFoundError):
        if stamp.read_text() == wanted:
            return home
    uv = _uv()
    tell(f"installing {peer} into {home.relative_to(ROOT)}")
    # The interpreter that fedmesh runs on: one build of Python can be a quarter faster than another.
    _run([uv, "venv", "--quiet", "--clear", "--python", str(Path(sys.executable).resolve()), str(home)])
    # Compiled here, once: Flower starts a Python for every message.
    _run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(home), "-r", str(requirements)])
    stamp.write_text(wanted)
    return home


def version(home: Path, package: str) -> str:
    """The version of a package that an environment has; "" if it has none."""
    found = [path.name.split("-")[1] for path in home.glob(f"lib/python*/site-packages/{package}-*.dist-info")]
    return found[0].removesuffix(".dist") if found else ""


def python(home: Path) -> str:
    """The Python version of an environment."""
    done = subprocess.run(  # noqa: S603 - our own environment
        [home / "bin" / "python", "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def _uv() -> str:
    own = ROOT / ".tools" / "bin" / "uv"
    found = str(own) if own.exists() else shutil.which("uv")
    if found is None:
        raise FedmeshError(Code.CONFIG_INVALID, "uv is missing: run `make setup` first")
    return found


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - uv, no shell
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE,
            f"installing took more than {INSTALL_TIMEOUT_S:.0f} s; try again: what was downloaded stays in uv's cache",
        ) from None
    if done.returncode != 0:
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE,
            f"uv {command[1]} failed. Packages come from PyPI: connect to it, or point UV_DEFAULT_INDEX to a mirror, "
            f"and run this again. uv said: {' '.join(done.stderr.split())[-600:]}",
        )
