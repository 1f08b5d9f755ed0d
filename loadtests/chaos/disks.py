"""A small disk of its own for each PostgreSQL, so that one can be filled: an ext4 image, mounted by a loop device.

The mounts are in a mount namespace of this process and its children: they are gone with the last of them, however it
ends, and nobody else sees them.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

SIZE_MB: Final = 1536
_NEW_NAMESPACE: Final = 0x00020000  # CLONE_NEWNS, sched.h
# Not everybody who is root has these on PATH.
_PATH: Final = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def own_namespace() -> bool:
    """Give this process a mount namespace of its own; False where that is not allowed. Call it before any child."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4", path=_PATH) is None:
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NAMESPACE) != 0:
        return False
    return _ran("mount", "--make-rprivate", "/")


def mount_disk(image: Path, folder: Path) -> bool:
    """Make a disk of SIZE_MB in a sparse file and mount it; False where there are no loop devices."""
    with image.open("wb") as file:
        file.truncate(SIZE_MB << 20)
    return _ran("mkfs.ext4", "-q", "-m", "0", str(image)) and _ran("mount", "-o", "loop", str(image), str(folder))


def unmount(folder: Path) -> None:
    if folder.is_mount():
        _ran("umount", "--lazy", str(folder))


def _ran(*command: str) -> bool:
    env = {**os.environ, "PATH": _PATH}
    return subprocess.run(command, env=env, capture_output=True, check=False, timeout=60).returncode == 0  # noqa: S603 - no shell
