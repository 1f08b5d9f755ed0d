import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.embedded import accounts
from services.embedded.postgres import EmbeddedPostgres
from services.embedded.redis import EmbeddedRedis, find_program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a normal user runs every other test as one")

# Everything is used once as root, so that all is imported; a normal user may be unable to enter the interpreter's home.
SCRIPT = """
import os, sys
from pathlib import Path
import psycopg
from services.embedded.postgres import EmbeddedPostgres
from services.embedded.redis import EmbeddedRedis

folder, postgres_programs, redis_program = (Path(argument) for argument in sys.argv[1:4])
uid = int(sys.argv[4])

def run(folder):
    postgres = EmbeddedPostgres(folder / "pg", binaries=postgres_programs, durable=False)
    redis = EmbeddedRedis(folder / "redis", program=redis_program)
    try:
        for _ in range(2):
            postgres.start()
            redis.start()
            with psycopg.connect(postgres.dsn("registry_service")) as connection:
                user = connection.execute("SELECT current_user").fetchone()[0]
            with redis.client("coordinator") as client:
                count = client.incr("coordinator:starts")
            owners = {os.stat(f"/proc/{server.status().pid}").st_uid for server in (postgres, redis)}
            postgres.stop()
            redis.stop()
        return user, count, owners
    finally:
        postgres.destroy()
        redis.destroy()

run(folder / "root")
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
print(run(folder / "normal"))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_both_stores_run_as_a_normal_user(open_folder: Path) -> None:
    nobody = accounts.store_account()
    programs = EmbeddedPostgres(open_folder / "unused")._programs()
    redis_program = accounts.reachable_program(
        find_program().parent, find_program(), nobody, [Path(find_program().name)]
    )
    (open_folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", str(open_folder), str(programs), str(redis_program), str(nobody.uid)],
        cwd=open_folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(("registry_service", 2, {nobody.uid}))


def test_a_user_without_an_entry_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unknown = next(uid for uid in range(54321, 60000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})
    monkeypatch.setattr(os, "geteuid", lambda: unknown)
    for make in (EmbeddedPostgres, EmbeddedRedis):
        with pytest.raises(FedmeshError, match=f"no entry for uid {unknown}") as caught:
            make(tmp_path)
        assert caught.value.code is Code.CONFIG_INVALID
