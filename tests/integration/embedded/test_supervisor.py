import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.common.errors import Code, FedmeshError
from services.embedded import processes
from services.embedded.guard import Guard
from services.embedded.postgres import EmbeddedPostgres
from services.embedded.redis import EmbeddedRedis
from services.embedded.supervisor import ChildSpec, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# Ignores SIGTERM and leaves a daemon behind, in a session of its own and with a forgotten parent.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
daemon = "import os,sys,time; os.fork() and os._exit(0); os.setsid(); "
report = "open(sys.argv[1],'w').write(str(os.getpid())); time.sleep(60)"
subprocess.run([sys.executable, "-c", daemon + report, sys.argv[1]])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[2], "w").write(str(worker.pid))
time.sleep(60)
"""


@pytest.fixture
def supervisor(tmp_path: Path, store_guard: Guard) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "run", guard=store_guard) as supervisor:
        yield supervisor


def gone(*pids: int) -> bool:
    return processes.wait_until(lambda: not any(processes.start_mark(pid) for pid in pids), 15.0)


def read_pid(path: Path) -> int:
    assert processes.wait_until(lambda: path.exists() and path.read_text() != "", 10.0)
    return int(path.read_text())


def test_children_start_serve_and_stop(supervisor: Supervisor, tmp_path: Path) -> None:
    flag = tmp_path / "ready"
    code = "import sys,time; print('hello', flush=True); open(sys.argv[1],'w'); time.sleep(60)"
    pid = supervisor.start(ChildSpec("registry", [sys.executable, "-c", code, str(flag)], ready=flag.exists))
    supervisor.wait_ready(["registry"], 10.0)
    assert os.getsid(pid) == pid
    assert supervisor.pids() == [pid]
    assert supervisor.ended() == []
    assert supervisor.log("registry").read_text() == "hello\n"
    assert stat.S_IMODE(supervisor.log("registry").stat().st_mode) == 0o600
    supervisor.stop("registry")
    supervisor.stop("registry")
    assert gone(pid)
    assert supervisor.status() == []


def test_a_running_child_is_not_started_twice(supervisor: Supervisor) -> None:
    supervisor.start(ChildSpec("registry", SLEEP))
    with pytest.raises(FedmeshError, match="runs already") as caught:
        supervisor.start(ChildSpec("registry", SLEEP))
    assert caught.value.code is Code.WRONG_STATE


def test_a_child_that_fails_is_reported_with_its_last_words(supervisor: Supervisor) -> None:
    code = "import sys; sys.exit('audit: port 7004 is taken')"
    supervisor.start(ChildSpec("audit", [sys.executable, "-c", code], ready=lambda: False))
    with pytest.raises(FedmeshError, match=r"audit ended with exit code 1.*port 7004 is taken") as caught:
        supervisor.wait_ready(["audit"], 10.0)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE
    assert [(status.name, status.exit_code) for status in supervisor.ended()] == [("audit", 1)]


def test_a_child_that_never_serves_is_reported(supervisor: Supervisor) -> None:
    supervisor.start(ChildSpec("audit", SLEEP, ready=lambda: False))
    with pytest.raises(FedmeshError, match="audit was not ready in"):
        supervisor.wait_ready(["audit"], 0.2)


def test_a_killed_child_shows_and_can_start_again(supervisor: Supervisor) -> None:
    first = supervisor.start(ChildSpec("north", SLEEP))
    supervisor.kill("north")
    assert gone(first)
    assert [status.exit_code for status in supervisor.ended()] == [-signal.SIGKILL]
    assert supervisor.start(ChildSpec("north", SLEEP)) != first
    assert supervisor.ended() == []


def test_stopping_spares_no_descendant(supervisor: Supervisor, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", STUBBORN, str(tmp_path / "daemon"), str(tmp_path / "worker")]
    pid = supervisor.start(ChildSpec("north", argv, grace_s=0.3))
    worker, daemon = read_pid(tmp_path / "worker"), read_pid(tmp_path / "daemon")
    supervisor.stop("north")
    assert gone(pid, worker)
    # A double fork into a session of its own is out of a supervisor's sight; the guard finds it by its environment.
    os.kill(daemon, signal.SIGKILL)


def test_higher_ranks_end_first(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import signal,sys,time\n"
        "def end(*_):\n    time.sleep(float(sys.argv[2])); open(sys.argv[1],'a').write(sys.argv[3]); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); open(sys.argv[1] + sys.argv[3], 'w'); time.sleep(60)"
    )
    order = tmp_path / "order"
    for name, rank, delay in (("service", 1, 0.0), ("hospital", 2, 0.3)):
        ready = Path(f"{order}{name[0]}")
        argv = [sys.executable, "-c", code, str(order), str(delay), name[0]]
        supervisor.start(ChildSpec(name, argv, rank=rank, ready=ready.exists))
    supervisor.wait_ready(["service", "hospital"], 10.0)
    supervisor.stop_all()
    assert order.read_text() == "hs"


def test_a_recycled_pid_is_neither_shown_nor_signalled(supervisor: Supervisor, tmp_path: Path) -> None:
    stranger = processes.spawn(["sleep", "60"], tmp_path / "log")
    try:
        supervisor.run_dir.mkdir()
        content = {"pid": stranger.pid, "mark": "an earlier process", "grace_s": 1, "rank": 1}
        (supervisor.run_dir / "north.json").write_text(json.dumps(content))
        assert [status.running for status in supervisor.status()] == [False]
        supervisor.stop_all()
        assert stranger.poll() is None
        assert supervisor.status() == []
    finally:
        stranger.kill()
        stranger.wait()


# ---- the end of the parent


def run_parent(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from services.embedded.guard import Guard\nfrom services.embedded.postgres import EmbeddedPostgres\n"
        "from services.embedded.redis import EmbeddedRedis\n"
        "from services.embedded.supervisor import ChildSpec, Supervisor\n"
        "folder = Path(sys.argv[1])\n" + textwrap.dedent(body)
    )
    argv = [sys.executable, str(script), str(tmp_path)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    parent = run_parent(
        tmp_path,
        """
        guard = Guard()
        postgres = EmbeddedPostgres(folder / "pg", durable=False, guard=guard)
        redis = EmbeddedRedis(folder / "redis", guard=guard)
        postgres.start()
        redis.start()
        argv = [sys.executable, str(folder / "stubborn.py"), str(folder / "daemon"), str(folder / "worker")]
        north = Supervisor(folder / "run", guard=guard).start(ChildSpec("north", argv, grace_s=0.3))
        print(guard.pid, postgres.status().pid, redis.status().pid, north, flush=True)
        time.sleep(60)
        """,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    pids += [read_pid(tmp_path / "worker"), read_pid(tmp_path / "daemon")]
    assert len(pids) == 6
    parent.kill()
    parent.communicate()
    assert gone(*pids)
    assert "database system is shut down" in (tmp_path / "pg" / "postgresql.log").read_text()
    for store in (EmbeddedPostgres(tmp_path / "pg"), EmbeddedRedis(tmp_path / "redis")):
        assert not store.status().running
        store.destroy()


@pytest.mark.parametrize(
    "delay_s", [0.0, 0.6, *(pytest.param(late, marks=pytest.mark.slow) for late in (0.3, 0.9, 1.2))]
)
def test_nothing_is_left_when_ctrl_c_comes_at_any_moment_of_a_start(tmp_path: Path, delay_s: float) -> None:
    parent = run_parent(
        tmp_path,
        """
        print("starting", flush=True)
        guard = Guard()
        postgres = EmbeddedPostgres(folder / "pg", durable=False, guard=guard)
        redis = EmbeddedRedis(folder / "redis", guard=guard)
        try:
            with Supervisor(folder / "run", guard=guard) as supervisor:
                redis.start()
                postgres.start()
                for number in range(50):
                    supervisor.start(ChildSpec(f"north-{number}", ["sleep", "60"]))
                time.sleep(60)
        finally:
            redis.stop()
            postgres.stop()
            guard.close()
        """,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    time.sleep(delay_s)
    os.killpg(parent.pid, signal.SIGINT)
    parent.communicate(timeout=30)
    assert parent.returncode == -signal.SIGINT
    assert processes.wait_until(lambda: not mentioning(tmp_path), 15.0), mentioning(tmp_path)


def mentioning(folder: Path) -> list[str]:
    """Processes that work in the folder, or have it in their open files."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            paths = [process.cwd(), *(file.path for file in process.open_files())]
            if any(path.startswith(f"{folder}/") for path in paths):
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return found


def test_without_a_guard_children_outlive_the_parent_and_are_found_again(tmp_path: Path) -> None:
    parent = run_parent(
        tmp_path,
        """
        redis = EmbeddedRedis(folder / "redis")
        redis.start()
        Supervisor(folder / "run").start(ChildSpec("registry", ["sleep", "60"]))
        """,
    )
    parent.communicate(timeout=30)
    redis, later = EmbeddedRedis(tmp_path / "redis"), Supervisor(tmp_path / "run")
    try:
        assert redis.status().running
        assert [(status.name, status.running) for status in later.status()] == [("registry", True)]
    finally:
        pids = [*later.pids(), redis.status().pid]
        later.stop_all()
        redis.destroy()
    assert gone(*[pid for pid in pids if pid is not None])
    assert later.status() == []
