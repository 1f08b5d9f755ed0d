"""The interpreter that `make` takes: what is asked for, else a quick one of PATH, else whatever uv finds."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "choose_python.sh"


def chosen(path: str, **environment: str) -> str:
    done = subprocess.run(
        [SCRIPT], env={"PATH": path, **environment}, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def test_what_is_asked_for_is_taken() -> None:
    assert chosen(os.defpath, UV_PYTHON="/opt/python") == "/opt/python"


def test_one_of_another_version_or_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(("#!/bin/sh\nexit 1\n", "no program")):
        program = tmp_path / str(number) / "python3.11"
        program.parent.mkdir()
        program.write_text(text)
        program.chmod(0o755)
    assert chosen(f"{tmp_path / '0'}:{tmp_path / '1'}:{tmp_path / 'missing'}") == "3.11"


def test_one_around_a_shared_library_is_left_for_uv_to_find(tmp_path: Path) -> None:
    (tmp_path / "python3.11").symlink_to(Path(sys.executable).resolve())
    shared = "libpython" in Path("/proc/self/maps").read_text()
    assert chosen(str(tmp_path)) == ("3.11" if shared else str(tmp_path / "python3.11"))
