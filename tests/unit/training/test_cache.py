import subprocess
import sys
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.artifact import Artifact, Graph, read_artifact, write_artifact
from services.hospital_node.training.cache import cache_key
from services.hospital_node.training.runtime import GraphRunner
from tests.support.tiny_plan import PRIVATE, changed, manifest
from tests.unit.training.conftest import Compiled


def test_two_processes_compile_a_plan_once(compiled: Compiled) -> None:
    first, second = compiled.outputs
    assert first == second, compiled.errors
    _, tensorflow = first.split()
    assert tensorflow == "False"
    assert len(compiled.folders) == 1
    key = cache_key(manifest(PRIVATE))
    assert compiled.entries == {key, f"{key}.lock"}
    assert compiled.cache.stat().st_mode & 0o077 == 0


def test_key_depends_on_the_plan() -> None:
    assert cache_key(manifest(PRIVATE)) == cache_key(manifest(PRIVATE))
    assert cache_key(manifest(PRIVATE)) != cache_key(manifest(changed(PRIVATE, "privacy.clip_norm", 2)))


def test_damaged_entries_are_noticed(tmp_path: Path) -> None:
    artifact = Artifact(Graph(b"one", ("a:0",), ("b:0", "c:1")), Graph(b"two", (), ()))
    write_artifact(tmp_path, artifact)
    assert read_artifact(tmp_path) == artifact
    for name in ("work.pb", "update.pb", "binding.json"):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(good[:-1])
        with pytest.raises(FedmeshError, match="damaged"):
            read_artifact(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FedmeshError, match="damaged"):
            read_artifact(tmp_path)
        (tmp_path / name).write_bytes(good)


def test_compiler_refuses_a_bad_plan(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_bytes(b"{}")
    module = "services.hospital_node.training.compile"
    command = [sys.executable, "-m", module, "--plan", str(plan), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "plan-invalid" in done.stderr


def test_runtime_refuses_what_is_not_a_graph() -> None:
    with pytest.raises(FedmeshError) as caught:
        GraphRunner(Graph(b"\xff\xff\xff", (), ()))
    assert caught.value.code is Code.INTERNAL
    with pytest.raises(FedmeshError, match="no tensor missing:0"):
        GraphRunner(Graph(b"", ("missing:0",), ()))
