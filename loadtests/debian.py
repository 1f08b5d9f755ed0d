"""Programs of Debian that are no part of the lock."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Final

from services.common.errors import Code, FedmeshError

INSTALL_TIMEOUT_S: Final = 600.0


def install(packages: Sequence[str], say: Callable[[str], None], *, optional: bool) -> None:
    """Install packages by apt-get; does nothing where that cannot be: not root, or not Debian.

    Raises: FedmeshError(CONFIG_INVALID) when apt-get failed, unless the packages are optional.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    say(f"installing {', '.join(packages)} by apt-get")
    # Debian would start the servers at once, as services of the machine: RUNLEVEL tells invoke-rc.d not to.
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(  # noqa: S603 - no shell
            ["apt-get", "-qq", *command],  # noqa: S607 - the system's own
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0 and not optional:
            said = " ".join(done.stderr.split())[-400:]
            raise FedmeshError(Code.CONFIG_INVALID, f"apt-get could not install {', '.join(packages)}: {said}")
