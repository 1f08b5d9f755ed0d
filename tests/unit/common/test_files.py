"""Whether a command may write where it is told to."""

import re
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.common.files import require_writable


def test_files_that_can_be_written_and_no_file_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    require_writable(None, tmp_path / "new.json", tmp_path / "old.json", Path("relative.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.json"], "nothing is made"


@pytest.mark.parametrize("name", ["", "no/such/folder/r.json"])
def test_a_folder_or_a_file_without_one_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        FedmeshError, match=f"cannot write {re.escape(str(tmp_path / name))}: no such folder"
    ) as refused:
        require_writable(None, tmp_path / name)
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_what_the_system_would_not_let_it_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root the system lets everything be written, whatever the mode says: it is asked as for another user.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(FedmeshError, match="no permission"):
        require_writable(tmp_path / "new.json")
