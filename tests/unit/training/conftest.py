import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.plans.manifest import canonical_bytes
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


@dataclass(frozen=True)
class Compiled:
    """What two processes did that compiled the two tiny plans at the same time.

    outputs: each process's digests of the graphs; folders: the scratch folders seen, one a compilation.
    """

    cache: Path
    outputs: list[str]
    errors: list[str]
    folders: set[str]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    cache, plans = folder / "cache", [folder / "private.json", folder / "fedavg.json"]
    for path, document in zip(plans, (PRIVATE, FEDAVG), strict=True):
        path.write_bytes(canonical_bytes(manifest(document)))
    command = [sys.executable, "-c", _COMPILE, str(cache), *map(str, plans)]
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
    return Compiled(cache, [answer[0] for answer in answers], [answer[1] for answer in answers], folders)


@pytest.fixture(scope="session")
def cache(compiled: Compiled) -> Path:
    """Compiled plans, shared by all tests: compiling takes some 15 s a plan."""
    return compiled.cache
