"""Files of personal models: sealed for this hospital alone, inside their folder whatever the job is called."""

import stat
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.store.personal import PERSONAL_FOLDER, PersonalFiles, load_personal
from services.secure_sum.roster import MemberKeys

KEYS = MemberKeys.generate("north")
MODEL = b"the weights of the hospital's own model"


def test_only_the_hospital_itself_reads_its_model(tmp_path: Path) -> None:
    files = PersonalFiles(tmp_path, KEYS)
    assert files.load("job", 3) is None
    files.save("job", 3, MODEL)
    assert PersonalFiles(tmp_path, KEYS).load("job", 3) == MODEL
    (path,) = (tmp_path / PERSONAL_FOLDER).iterdir()
    assert MODEL not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for keys in (MemberKeys.generate("north"), MemberKeys("south", KEYS.signing, KEYS.sealing)):
        with pytest.raises(FedmeshError) as caught:
            load_personal(tmp_path / PERSONAL_FOLDER, keys, "job", 3)
        assert caught.value.code is Code.CIPHERTEXT_INVALID


def test_what_cannot_be_used_is_made_again(tmp_path: Path) -> None:
    files = PersonalFiles(tmp_path, KEYS)
    files.save("job", 3, MODEL)
    assert files.load("job", 4) is None, "of another version"
    (path,) = (tmp_path / PERSONAL_FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert files.load("job", 3) is None
    files.save("job", 3, MODEL)
    assert files.load("job", 3) == MODEL


@pytest.mark.parametrize("job_id", ["../../escaped", "/escaped", "a" * 500, "."])
def test_a_job_cannot_name_a_path(tmp_path: Path, job_id: str) -> None:
    (tmp_path / "node").mkdir()
    files = PersonalFiles(tmp_path / "node", KEYS)
    files.save(job_id, 1, MODEL)
    assert files.load(job_id, 1) == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["node"]
    assert len(list((tmp_path / "node" / PERSONAL_FOLDER).iterdir())) == 1
