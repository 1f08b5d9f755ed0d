"""Which operating-system account runs a store process, and what that account can reach.

PostgreSQL refuses to run as root, and as any uid without a passwd entry. Started by root, both stores therefore run as
`nobody`; started by a normal user they run as that user. For a process of `nobody` root opens its data folder, as
working directory or descriptor, so that the folder may lie below one that only root may enter (a root home, a 0700
temporary folder). Programs and sockets are looked up by path and must be in reach: `reachable_program` copies.
"""

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import Code, FedmeshError

# sockaddr_un.sun_path holds 108 bytes with the final zero, on Linux; 104 on BSD and macOS.
MAX_SOCKET_PATH_BYTES = 103
CACHE_ROOT = Path("/var/cache/fedmesh")


@dataclass(frozen=True)
class Account:
    """The account of a store process; `drop` says whether it differs from the caller's."""

    name: str
    uid: int
    gid: int
    drop: bool

    def popen_arguments(self) -> dict[str, Any]:
        """Arguments for `subprocess.Popen` that make the child run under this account and no further group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.drop else {}

    def own(self, path: Path) -> None:
        """Give a file or folder to the account."""
        if self.drop:
            os.chown(path, self.uid, self.gid)

    def can_enter(self, folder: Path) -> bool:
        """Whether the account may enter the folder, every parent included; asked of the kernel, by a process of it."""
        if not self.drop:
            return os.access(folder, os.X_OK)
        question = ["/usr/bin/env", "test", "-x", str(folder)]
        probe = subprocess.run(question, cwd="/", check=False, **self.popen_arguments())  # noqa: S603 - no shell
        return probe.returncode == 0


def store_account() -> Account:
    """The account for store processes: the caller's, or `nobody` when the caller is root.

    Raises: FedmeshError(CONFIG_INVALID) when the caller's uid has no passwd entry, or `nobody` does not exist.
    """
    uid = os.geteuid()
    try:
        entry = pwd.getpwnam("nobody") if uid == 0 else pwd.getpwuid(uid)
    except KeyError:
        missing = (
            "no account `nobody`, which PostgreSQL needs when root starts it" if uid == 0 else f"no entry for uid {uid}"
        )
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"/etc/passwd has {missing}; add one, or point the services at an existing PostgreSQL by DSN",
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, drop=uid == 0)


def private_folder(path: Path, account: Account | None = None) -> Path:
    """Create the folder if missing and close it to everyone but its owner (mode 0700): us, or the given account.

    Raises: FedmeshError(CONFIG_INVALID) when it cannot be created or is another user's; STORE_FULL on a full disk.
    """
    owner = os.geteuid() if account is None else account.uid
    try:
        path.mkdir(parents=True, exist_ok=True)
        if path.stat().st_uid not in (os.geteuid(), owner):
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the folder {path} belongs to another user: start as the user who made it, or choose another one",
            )
        if account is not None:
            account.own(path)
        path.chmod(0o700)
    except OSError as error:
        raise folder_error(path, error) from error
    return path


def folder_error(path: Path, error: OSError) -> FedmeshError:
    """The error to raise when a data folder cannot be used."""
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return FedmeshError(Code.STORE_FULL, f"no space left for {path}: free some or choose another data folder")
    return FedmeshError(
        Code.CONFIG_INVALID,
        f"cannot use the data folder {path}: {error.strerror}; choose a folder that this user owns",
    )


def socket_folder(preferred: Path, remembered: Path | None, socket_name: str, account: Account) -> Path:
    """A folder of mode 0700, owned by the account, whose path leaves room for a Unix socket called `socket_name`.

    Tries the folder in use before, then `preferred`, then one below the system's temporary folder: named after
    `preferred`, so that it is the same at every start, unless another user has taken that name.
    """
    for candidate in (remembered, preferred):
        if candidate is None or len(os.fsencode(candidate / socket_name)) > MAX_SOCKET_PATH_BYTES:
            continue
        if candidate == preferred:
            private_folder(candidate, account)
        if _owned_by(candidate, account) and account.can_enter(candidate):
            return candidate
    digest = hashlib.sha256(os.fsencode(preferred)).hexdigest()[:12]
    named = _short_temporary_root(socket_name, account) / f"fedmesh-{digest}"
    try:
        named.mkdir(mode=0o700)
        account.own(named)
    except FileExistsError:
        if not _owned_by(named, account):
            named = Path(tempfile.mkdtemp(prefix="fedmesh-", dir=named.parent))
            account.own(named)
    return named


def _owned_by(folder: Path, account: Account) -> bool:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == account.uid and found.st_mode & 0o170777 == 0o040700


def _short_temporary_root(socket_name: str, account: Account) -> Path:
    for root in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp makes a fresh 0700 folder inside
        if len(os.fsencode(root / "fedmesh-0123456789ab" / socket_name)) <= MAX_SOCKET_PATH_BYTES and account.can_enter(
            root
        ):
            return root
    raise FedmeshError(
        Code.CONFIG_INVALID,
        f"no temporary folder with a short path is open to `{account.name}`: set TMPDIR to one, such as /tmp",
    )


def reachable_program(root: Path, program: Path, account: Account, parts: Sequence[Path]) -> Path:
    """A path to `program` that the account can execute: itself, or a copy when a parent folder is closed to it.

    `root` is the folder to copy from, `program` a path inside it and `parts` what it needs at run time, relative to it.
    Copies are kept under /var/cache/fedmesh, owned by root, named by the installation's path and time.
    """
    if account.can_enter(program):
        return program
    stamp = hashlib.sha256(f"{root.resolve()}:{program.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    target = CACHE_ROOT / f"{program.name}-{stamp}"
    if not target.exists():
        _copy_program_tree(root, target, parts)
    copy = target / program.relative_to(root)
    if not account.can_enter(copy):
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"the account `{account.name}` cannot execute {copy}: run as a normal user, or install into an open folder",
        )
    return copy


def _copy_program_tree(root: Path, target: Path, parts: Sequence[Path]) -> None:
    try:
        CACHE_ROOT.mkdir(parents=True, exist_ok=True)
        CACHE_ROOT.chmod(0o755)
        staging = Path(tempfile.mkdtemp(dir=CACHE_ROOT))
        for part in parts:
            source = root / part
            if source.is_dir():
                shutil.copytree(
                    source, staging / part, symlinks=True, ignore=shutil.ignore_patterns("*.a", "*.h", "pgxs")
                )
            else:
                shutil.copy2(source, staging / part)
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:  # another process was quicker: its copy is as good
            shutil.rmtree(staging)
    except OSError as error:
        raise folder_error(CACHE_ROOT, error) from error
