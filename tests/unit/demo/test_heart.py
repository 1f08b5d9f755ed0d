"""The heart data: made-up files in the form of the public ones, against an independent reading of the recipe."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from services.common.errors import Code, FedmeshError
from services.demo import datasets, heart
from services.demo.datasets import DemoData
from services.demo.evaluation import owners_of_test
from services.demo.run import DemoOptions, choose_plan, prepare_data, read_all
from services.hospital_node.sources.dataset import SplitName
from services.plans.library import shipped_plan

PLAN = shipped_plan("heart-logistic")
SIZES = {"cleveland": 60, "hungarian": 50, "switzerland": 24, "va": 40}


def cells(rng: np.random.Generator, hospital: str) -> list[str]:
    whole = ".0" if hospital == "cleveland" else ""
    drawn = [
        *(f"{rng.integers(30, 75)}{whole}", f"{rng.integers(0, 2)}{whole}", f"{rng.integers(1, 5)}{whole}"),
        *(f"{rng.integers(100, 180)}{whole}", "0" if hospital == "switzerland" else f"{rng.integers(150, 400)}"),
        *(f"{rng.integers(0, 2)}{whole}", f"{rng.integers(0, 3)}{whole}", f"{rng.integers(80, 190)}{whole}"),
        *(f"{rng.integers(0, 2)}{whole}", f"{rng.integers(-5, 30) / 10:g}", "?", "?", "7"),
    ]
    return [*drawn, "3" if hospital == "switzerland" else str(rng.integers(0, 3))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("heart"), np.random.default_rng(45)
    for hospital, size in SIZES.items():
        rows = [cells(rng, hospital) for _ in range(size)]
        rows[3][4] = "?"
        (folder / f"processed.{hospital}.data").write_text("\n".join(",".join(row) for row in rows) + "\n")
    return folder


def prepared(source: Path, folder: Path, seed: int = 0) -> DemoData:
    options = DemoOptions(folder, data=source, privacy=None)
    return prepare_data(options, choose_plan(options), lambda _text: None, seed)


def expected(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 13 features and the outcome of one file by the benchmark's recipe."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    kept = [row[:10] + row[13:] for row in rows if "?" not in row[:10] + row[13:]]
    table = np.array(kept, dtype=float)
    chest = [(table[:, 2] == level) for level in (2, 3, 4)]
    ecg = [(table[:, 6] == level) for level in (1, 2)]
    numbers = [table[:, column] for column in (0, 1, 3, 4, 5, 7, 8, 9)]
    return np.stack([*numbers, *chest, *ecg], axis=1).astype(float), (table[:, 10] > 0).astype(float)


def test_features_split_and_scaling_are_the_benchmarks(source: Path, tmp_path: Path) -> None:
    data = prepared(source, tmp_path)
    assert "real hospitals" in data.description
    assert "synthetic" not in data.description.lower()
    assert sorted(data.hospitals) == sorted(SIZES)
    sets = dict(zip(data.hospitals, read_all(data, PLAN), strict=True))
    tested = [int(np.sum(dataset.split == SplitName.TEST)) for dataset in sets.values()]
    assert Counter(owners_of_test(list(sets.values())).tolist()) == dict(enumerate(tested))
    for hospital, dataset in sets.items():
        x, y = expected(source / f"processed.{hospital}.data")
        assert dataset.x.shape == (len(y), 13) == (SIZES[hospital] - 1, 13)
        strata = y if min(np.sum(y == 0), np.sum(y == 1)) > 2 else None
        rest, test = train_test_split(
            np.arange(len(y)), train_size=0.66, test_size=1 - 0.66, random_state=43, stratify=strata
        )
        assert np.flatnonzero(dataset.split == SplitName.TEST).tolist() == sorted(test)
        train = dataset.split == SplitName.TRAIN
        assert np.sum(~train[rest]) == pytest.approx(0.2 * len(rest), abs=1)
        deviation = x[train].std(axis=0)
        scaled = (x - x[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        np.testing.assert_allclose(dataset.x, scaled, atol=1e-5)
        assert dataset.y.tolist() == y.tolist()


def test_the_seed_moves_validation_rows_and_nothing_else(source: Path, tmp_path: Path) -> None:
    first, again, other = (
        heart.prepare(source, tmp_path / name, seed).partition.read_text().splitlines()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    moved = {
        tuple(line.rsplit(",", 1)[1] for line in lines)
        for lines in zip(first, other, strict=True)
        if len(set(lines)) > 1
    }
    assert moved == {("train", "val"), ("val", "train")}
    assert [line.rsplit(",", 1)[0] for line in first] == [line.rsplit(",", 1)[0] for line in other]


def test_privacy_is_refused_for_scaling_by_the_data(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="--privacy none") as caught:
        choose_plan(DemoOptions(tmp_path, data=source, privacy=0.5))
    assert caught.value.code is Code.PRIVACY_REFUSED


@pytest.mark.parametrize(
    ("hospital", "content", "message"),
    [
        ("va", None, "lacks processed.va.data"),
        ("va", "1,2,3\n", "processed.va.data: record 1 has 3 values, expected 14"),
        ("va", "", "processed.va.data has 0 complete records"),
        ("va", "63,1,4,140,260,0,1,112,1,3,2,?,?,9\n" * 20, "column 'num': 20 cells cannot be used"),
        ("va", "63,1,5,140,260,0,1,112,1,3,2,?,?,0\n" * 20, "column 'cp': 20 cells cannot be used"),
        ("va", 'a,"b\n', "processed.va.data: record 1 has 2 values, expected 14"),
    ],
)
def test_wrong_files_are_named(source: Path, tmp_path: Path, hospital: str, content: str | None, message: str) -> None:
    (tmp_path / "given").mkdir()
    for path in source.iterdir():
        (tmp_path / "given" / path.name).write_bytes(path.read_bytes())
    wrong = tmp_path / "given" / f"processed.{hospital}.data"
    if content is None:
        wrong.unlink()
    else:
        wrong.write_text(content)
    with pytest.raises(FedmeshError, match=message) as caught:
        prepared(tmp_path / "given", tmp_path)
    assert caught.value.code is Code.DATA_INVALID


def test_a_folder_with_neither_kind_of_files_names_both(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match=r"diabetic_data\.parquet.*processed\.cleveland\.data"):
        datasets.from_folder(tmp_path, PLAN)
    assert not heart.is_heart(tmp_path)
