"""A peer's processes: whatever happens, they and their children are gone afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtests.peers.children import Children, environment
from services.common.errors import Code, FedmeshError
from services.embedded.processes import wait_until

# Starts a child that ignores SIGTERM and writes down its pid.
STUBBORN = """
import os, signal, subprocess, sys, time
if sys.argv[1:] == ["child"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("pid.new", "w").write(str(os.getpid()))
    os.rename("pid.new", "pid")
else:
    subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(120)
"""


def new_children(folder: Path, timeout_s: float = 60.0) -> Children:
    return Children(folder, environment(Path(sys.prefix), {}), timeout_s)


def grandchild(folder: Path) -> int:
    assert wait_until(lambda: (folder / "pid").exists(), 30.0)
    return int((folder / "pid").read_text())


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN)
    return path


def test_descendants_are_gone_when_the_block_fails(tmp_path: Path, program: Path) -> None:
    def fail() -> None:
        with new_children(tmp_path) as children:
            children.start("stubborn", [sys.executable, program], cwd=tmp_path)
            grandchild(tmp_path)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()

    assert gone(grandchild(tmp_path))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_descendants_are_gone_when_we_are_interrupted_or_killed(tmp_path: Path, program: Path, signum: int) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom loadtests.peers.children import Children, environment\n"
        "with Children(Path('.'), environment(Path(sys.prefix), {}), 60) as children:\n"
        f"    children.start('stubborn', [sys.executable, {str(program)!r}])\n    time.sleep(120)\n"
    )
    root = str(Path(__file__).parents[3])
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}) as we:
        pid = grandchild(tmp_path)
        we.send_signal(signum)
        we.wait(60)

    assert wait_until(lambda: gone(pid), 60.0)


def test_a_program_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    def run() -> None:
        with new_children(tmp_path) as children:
            children.start("failing", [sys.executable, "-c", "print('no luck'); raise SystemExit(3)"])
            wait_until(lambda: children.finished("failing"), 30.0)

    with pytest.raises(FedmeshError, match="failing ended with code 3: no luck") as caught:
        run()
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_time_runs_out(tmp_path: Path) -> None:
    def run() -> None:
        with new_children(tmp_path, timeout_s=0.0) as children:
            children.start("slow", [sys.executable, "-c", "import time; time.sleep(120)"])
            time.sleep(0.01)
            children.check()

    with pytest.raises(FedmeshError, match="--timeout") as caught:
        run()
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def test_a_peer_inherits_no_python_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    env = environment(Path("/peer"), {"FLWR_HOME": "/x"})

    assert not {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"} & set(env)
    assert env["PATH"].startswith("/peer/bin:")
    assert env["FLWR_HOME"] == "/x"
