import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.memory import PeakMemory, memory_pss_mb
from services.embedded.processes import ProcessRecord


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    child = processes.spawn(["sleep", "60"], tmp_path / "sleep.log")
    yield child
    child.kill()
    child.wait()


def test_a_record_survives_a_file_and_a_recycled_pid_is_never_signalled(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    record = ProcessRecord.of(sleeper.pid)
    assert record is not None
    record.save(tmp_path / "pid")
    assert ProcessRecord.load(tmp_path / "pid") == record
    assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o600

    other = ProcessRecord(sleeper.pid, "an-earlier-process")
    assert not other.alive()
    assert other.family() == []
    assert processes.end_families([(other, signal.SIGKILL)], 0.1)
    assert sleeper.poll() is None

    def reap() -> None:
        sleeper.poll()

    assert processes.end_families([(record, signal.SIGTERM)], 5.0, reap)
    assert sleeper.wait() == -signal.SIGTERM
    assert not record.alive()


def test_a_disk_that_refuses_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedmeshError, match=r"cannot use the data folder .*/file: Not a directory; choose") as caught:
        processes.write_private(tmp_path / "file" / "x", "text")
    assert caught.value.code is Code.CONFIG_INVALID
    staging = tmp_path / f".x.{os.getpid()}.{threading.get_ident()}"
    staging.symlink_to("/dev/full")
    with pytest.raises(FedmeshError, match=f"no space left for {tmp_path}: free some") as caught:
        processes.write_private(tmp_path / "x", "text")
    assert caught.value.code is Code.STORE_FULL
    assert not staging.is_symlink()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "mark": 1}', "null"])
def test_a_torn_pid_file_is_no_process(tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    assert ProcessRecord.load(tmp_path / "pid") is None


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    child = processes.spawn(["sleep", "60"], tmp_path / "log")
    record = ProcessRecord.of(child.pid)
    assert record is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not record.alive()
    child.wait()


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="no-such-program") as caught:
        processes.spawn(["no-such-program"], tmp_path / "log")
    assert caught.value.code is Code.CONFIG_INVALID


def test_an_interrupt_waits_for_the_end_of_a_step() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the order inside is what is tested
        with processes.deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("whole")
        steps.append("after")
    assert steps == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_steps_within_steps_hold_an_interrupt_until_the_outermost_ends() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with processes.deferred_interrupts():
            with processes.deferred_interrupts():
                signal.raise_signal(signal.SIGINT)
            steps.append("whole")
        steps.append("after")
    assert steps == ["whole"]


def test_threads_other_than_the_main_one_may_defer_too() -> None:
    passed = threading.Event()

    def step() -> None:
        with processes.deferred_interrupts():
            passed.set()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert passed.is_set()


def test_a_taken_port_is_named_and_a_free_one_is_free() -> None:
    processes.require_free_port(processes.free_port(), "PostgreSQL")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(FedmeshError, match=f"PostgreSQL cannot listen on 127.0.0.1:{port}") as caught:
            processes.require_free_port(port, "PostgreSQL")
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("FATAL: could not write: No space left on device", Code.STORE_FULL),
        ("bind: Address already in use", Code.CONFIG_INVALID),
        ("could not open file: Permission denied", Code.CONFIG_INVALID),
        ("something else", Code.STORE_UNAVAILABLE),
        ("", Code.STORE_UNAVAILABLE),
    ],
)
def test_start_errors_are_told_from_the_log(tmp_path: Path, log: str, code: Code) -> None:
    path = tmp_path / "log"
    path.write_text("No space left on device, long ago\n" + log)
    assert processes.start_error("Redis", path, 34, 6379).code is code


def test_long_socket_paths_move_to_a_short_private_folder(tmp_path: Path) -> None:
    account = accounts.store_account()
    folder = accounts.socket_folder(tmp_path / ("x" * 100), None, "redis.sock", account)
    try:
        assert len(os.fsencode(folder / "redis.sock")) <= accounts.MAX_SOCKET_PATH_BYTES
        found = folder.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, account.uid)
        assert accounts.socket_folder(tmp_path / ("x" * 100), folder, "redis.sock", account) == folder
        folder.chmod(0o755)  # no longer ours alone: not trusted
        other = accounts.socket_folder(tmp_path / ("x" * 100), folder, "redis.sock", account)
        other.rmdir()
        assert other != folder
    finally:
        folder.rmdir()


def test_memory_counts_descendants_and_survives_the_dead() -> None:
    code = "import subprocess,sys; x = b'1' * 30_000_000; print(flush=True); sys.stdin.read()"
    nested = f"import subprocess,sys; p = subprocess.Popen([sys.executable, '-c', {code!r}]); p.wait()"
    child = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with PeakMemory(lambda: [child.pid], interval_s=0.01) as peak:
        assert memory_pss_mb([child.pid, child.pid]) > 28
        peak.sample()
    child.communicate()
    assert memory_pss_mb([child.pid]) == 0
    assert 28 < peak.peak_mb < 200


def test_the_peak_counts_what_is_there_at_the_end() -> None:
    """Of a process that does nothing else: this one may have a child of another test that is just ending."""
    code = "import sys; print(flush=True); input(); x = b'1' * 50_000_000; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    with PeakMemory(lambda: [child.pid], interval_s=60) as peak:
        assert processes.wait_until(lambda: peak.peak_mb > 0, 10)
        before = peak.peak_mb
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
    child.communicate()
    assert peak.peak_mb > before + 40


def test_no_port_is_given_twice() -> None:
    """Two services of one stack would fight for it; of some 28,000 ports, 2,000 draws are hardly ever all different."""
    ports = [processes.free_port() for _ in range(2000)]
    assert len(set(ports)) == len(ports)
