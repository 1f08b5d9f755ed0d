"""Compiled plans on disk, each compiled once however many processes ask."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.artifact import Artifact, read_artifact
from services.hospital_node.training.packages import fingerprint
from services.plans.algorithms import InstalledFamily
from services.plans.manifest import PlanManifest, canonical_bytes, plan_id

_COMPILER_SOURCES: Final = ("process.py", "compile.py", "artifact.py", "metrics.py", "networks.py", "families/*.py")
_COMPILE_TIMEOUT_S: Final = 300.0


def compiled_plan(manifest: PlanManifest, cache: Path) -> Artifact:
    """The compiled plan from `cache`, compiled by a child process first if need be.

    Entries are addressed by plan id, TFF and TensorFlow versions, the compiler's own source and, if the plan is of an
    installed family, that family's source. A lock file lets the
    hospitals of one machine share a cache: the first compiles, the others wait. Whoever can write the directory decides
    what a hospital computes: share it only between processes of one trust domain; it is made with mode 0700.

    Raises: FedmeshError(INTERNAL) when compiling fails.
    """
    # Checks change what a round releases, not how it trains.
    manifest = manifest.without_checks
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = cache / cache_key(manifest)
    with locked(cache / f"{entry.name}.lock"):
        if entry.is_dir():
            with suppress(FedmeshError):
                return read_artifact(entry)
            shutil.rmtree(entry)
        with tempfile.TemporaryDirectory(prefix="compile-", dir=cache) as scratch:
            out = Path(scratch) / "out"
            out.mkdir()
            plan = Path(scratch) / "plan.json"
            plan.write_bytes(canonical_bytes(manifest))
            _compile(plan, out)
            artifact = read_artifact(out)
            out.rename(entry)
        return artifact


def cache_key(manifest: PlanManifest) -> str:
    """SHA-256 over everything that decides the graphs, in hex."""
    digest = hashlib.sha256()
    for part in (plan_id(manifest), version("tensorflow-federated"), version("tensorflow")):
        digest.update(part.encode() + b"\n")
    for pattern in _COMPILER_SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    if isinstance(manifest.algorithm, InstalledFamily):
        digest.update(fingerprint(manifest.algorithm.family))
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(plan: Path, out: Path) -> None:
    command = [sys.executable, "-m", "services.hospital_node.training.compile", "--plan", str(plan), "--out", str(out)]
    # Several hospitals may share few cores, and the graphs are small: one thread is as fast.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    # A file, not a pipe: a child that TFF started would inherit a pipe and keep it open after its parent's death.
    with tempfile.TemporaryFile(dir=out.parent) as errors:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            command, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(_COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # TFF's executor (worker_binary) outlives a crashed parent; it is in the same new process group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
            tail = errors.read().decode(errors="replace").strip().splitlines()
            reason = tail[-1][:300] if tail else "no output"
            what = "took too long" if code is None else f"ended with status {code}"
            raise FedmeshError(Code.INTERNAL, f"compiling the plan with TensorFlow Federated {what}: {reason}")
