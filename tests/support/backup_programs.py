"""The programs of the restore drill beyond the lock: PostgreSQL and pgBackRest or Barman of Debian, and a local S3.

`python -m tests.support.backup_programs` installs what is missing, where that is possible. Tests only look.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loadtests.debian import install
from loadtests.peers.environments import CACHE, prepare
from services.common.errors import FedmeshError

# Program by package. Debian's tools are made for Debian's PostgreSQL; the lock's is newer than they know.
PGBACKREST: Final = {"pgbackrest": "pgbackrest"}
BARMAN: Final = {"barman-cli-cloud": "barman-cloud-backup"}
POSTGRES_PACKAGE: Final = "postgresql"
_REQUIREMENTS: Final = Path(__file__).with_name("moto-requirements.txt")


def postgres_folder() -> Path | None:
    """The programs of Debian's newest PostgreSQL."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in found), key=lambda path: int(path.parent.name), default=None)


def lacking(packages: Mapping[str, str]) -> list[str]:
    """Packages of Debian whose programs are not there."""
    missing = [package for package, program in packages.items() if shutil.which(program) is None]
    return missing if postgres_folder() else [POSTGRES_PACKAGE, *missing]


def s3_server() -> Path | None:
    """The program of a local S3."""
    program = CACHE / "moto" / "bin" / "moto_server"
    return program if program.exists() else None


def main() -> None:
    missing = lacking(PGBACKREST | BARMAN)
    try:
        if missing:
            install(missing, print, optional=True)
        prepare("moto", print, _REQUIREMENTS)
    except FedmeshError as error:
        # The drill says what it leaves out for want of this.
        print(error.message)


if __name__ == "__main__":
    main()
