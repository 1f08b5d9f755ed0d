"""Which releases run on which migrations."""

from pathlib import Path

import pytest

from services.audit.store import MIGRATIONS as AUDIT
from services.common.migrations import NewerSchemaError, Release
from services.registry.store import MIGRATIONS as REGISTRY


@pytest.mark.parametrize(("schema", "folder"), [("registry", REGISTRY), ("audit", AUDIT)])
def test_every_migration_says_which_releases_run_on_it(schema: str, folder: Path) -> None:
    release = Release.read(schema, folder)
    assert sorted(release.oldest) == sorted(path.stem for path in folder.glob("*.sql"))
    for migration, oldest in release.oldest.items():
        # What keeps older releases out says why, where its reader looks first.
        why = (folder / f"{migration}.sql").read_text().splitlines()[1]
        number = int(migration[:4])
        assert oldest < number or number == 1 or why.startswith("-- An older one "), migration


@pytest.mark.parametrize(
    "text", ["", "-- oldest-release: 2\n", "-- oldest-release: 0003\n", "-- oldest-release: 0000\n"]
)
def test_a_migration_that_does_not_say_it_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "0002_more.sql").write_text(f"{text}select 1;\n")
    with pytest.raises(ValueError, match="oldest-release"):
        Release.read("registry", tmp_path)


def test_a_release_runs_on_newer_migrations_that_all_let_it() -> None:
    release = Release("registry", {"0001_first": 1, "0002_second": 1})
    assert release.newer({"0001_first", "0002_second", "0003_third"}) == ["0003_third"]
    assert release.missing({"0001_first", "0003_third"}) == ["0002_second"]
    release.require_runs_with(["0003_a", "0004_b"], {"0003_a": 1, "0004_b": 2})
    for recorded in ({"0003_a": 1}, {"0003_a": 1, "0004_b": 3}, {}):
        with pytest.raises(NewerSchemaError, match="run a newer release, or restore a backup"):
            release.require_runs_with(["0003_a", "0004_b"], recorded)
