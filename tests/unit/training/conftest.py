import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.plans.manifest import canonical_bytes
from tests.support.family_plans import BLOCKS, INSTALLED, PLANS
from tests.support.tiny_plan import FEDAVG, PRIVATE, manifest

_COMPILE = """
import hashlib, pathlib, sys
from services.hospital_node.training.cache import compiled_plan
from services.plans.manifest import parse_manifest
for plan in sys.argv[2:]:
    artifact = compiled_plan(parse_manifest(pathlib.Path(plan).read_bytes()), pathlib.Path(sys.argv[1]))
    print(hashlib.sha256(artifact.work.graph_def + artifact.update.graph_def).hexdigest())
print("tensorflow" in sys.modules)
"""


# Compiles the other plans in one process: importing TFF costs more than compiling.
_COMPILE_ALL = """
import pathlib, sys
from services.hospital_node.training.artifact import write_artifact
from services.hospital_node.training.cache import cache_key
from services.hospital_node.training.compile import compile_plan
from services.hospital_node.training.families import base
from services.plans.manifest import parse_manifest
usual = base._BLOCK_VALUES
for path in map(pathlib.Path, sys.argv[2:]):
    plan = parse_manifest(path.read_bytes())
    base._BLOCK_VALUES = 7 * plan.train_length if plan.name == "tiny-blocks" else usual
    entry = pathlib.Path(sys.argv[1]) / cache_key(plan)
    entry.mkdir()
    write_artifact(entry, compile_plan(plan))
"""


@dataclass(frozen=True)
class Compiled:
    """What two processes did that compiled a tiny plan at the same time.

    outputs: each process's digest of the graphs; folders: the scratch folders seen, one a compilation; entries: what
    was in the cache then.
    """

    cache: Path
    outputs: list[str]
    errors: list[str]
    folders: set[str]
    entries: set[str]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    cache, plan = folder / "cache", folder / "private.json"
    plan.write_bytes(canonical_bytes(manifest(PRIVATE)))
    command = [sys.executable, "-c", _COMPILE, str(cache), str(plan)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    folders: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            folders.update(path.name for path in cache.glob("compile-*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answers = [child.communicate(timeout=170) for child in children]
    finally:
        done.set()
        watcher.join()
        for child in children:
            child.kill()
            child.wait()
    entries = {path.name for path in cache.iterdir()}
    return Compiled(cache, [answer[0] for answer in answers], [answer[1] for answer in answers], folders, entries)


@pytest.fixture(scope="session")
def cache(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled plans of every family, shared by all tests."""
    folder, paths = tmp_path_factory.mktemp("plans"), []
    for plan in (manifest(FEDAVG), BLOCKS, *PLANS.values()):
        paths.append(folder / f"{plan.name}.json")
        paths[-1].write_bytes(canonical_bytes(plan))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(INSTALLED), *filter(None, sys.path)])}
    command = [sys.executable, "-c", _COMPILE_ALL, str(compiled.cache), *map(str, paths)]
    with (folder / "log").open("wb") as log:
        # Its own process group: TFF's executor outlives the process that started it.
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(270)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert code == 0, (folder / "log").read_text()[-3000:]
    return compiled.cache


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example package of an installed family is on the import path."""
    monkeypatch.syspath_prepend(str(INSTALLED))
