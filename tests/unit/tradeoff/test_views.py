"""What people and machines get to see of a curve."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from services.common.errors import Code, FedmeshError
from services.privacy.budget import DEFAULT_LIMIT
from services.tradeoff import picture, terminal
from services.tradeoff.recommendation import recommend
from services.tradeoff.report import TradeoffReport, write_report
from tests.support.curves import curve, report

FIGURES = {0.1: (0.60, 0.20), 0.5: (0.69, 0.29), 2.0: (0.70, 0.30)}


def found(runs: int = 3, *, synthetic: bool = True) -> TradeoffReport:
    drawn = curve(FIGURES, runs=runs)
    return report(drawn, recommend(drawn, 0.9, 1e-6, DEFAULT_LIMIT, {}), synthetic=synthetic)


def shown(result: TradeoffReport, *, colours: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=colours, legacy_windows=False)
    terminal.show(console, result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("runs", [1, 3])
def test_the_picture_is_a_png_of_its_size_with_the_curve_in_it(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "curve.png"
    picture.draw(found(runs), path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (picture.WIDTH_PX, picture.HEIGHT_PX)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    # The curve's blue, 0072B2, and the band's lighter one, in both halves.
    half = picture.WIDTH_PX // 2
    for side in (pixels[:, :half], pixels[:, half:]):
        assert (np.abs(side - [0x00, 0x72, 0xB2]).sum(axis=2) < 12).sum() > 300
        band = (np.abs(side - [0xCC, 0xE3, 0xF0]).sum(axis=2) < 12).sum()
        assert band > 300 if runs > 1 else band < 100


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError) as caught:
        picture.draw(found(), tmp_path / "nowhere" / "curve.png")
    assert caught.value.code is Code.STORE_FULL


def test_the_terminal_says_everything_in_80_columns() -> None:
    text = shown(found())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for part in ("(AUROC)", "(AUPRC)", "no privacy", "hospital alone", "0.6900", "Recommended: epsilon 0.5"):
        assert part in text
    assert "SYNTHETIC" in text
    assert "charged to their ledger" in " ".join(text.split())
    assert "\x1b[" in shown(found(), colours=True)


def test_one_run_has_no_band_and_says_so() -> None:
    assert "no band. Give --seeds" in " ".join(shown(found(1)).split())
    assert "no band" not in shown(found(3))


def test_public_data_is_not_called_synthetic() -> None:
    assert "SYNTHETIC" not in shown(found(synthetic=False))


def test_the_report_has_all_figures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(found(), path)
    read = json.loads(path.read_text())
    assert [point["epsilon"] for point in read["points"]] == [0.1, 0.5, 2.0]
    for point in read["points"]:
        assert point["auroc"]["low"] < point["auroc"]["mean"] < point["auroc"]["high"]
        assert len(point["auprc"]["values"]) == read["seeds"] == 3
    assert read["no_privacy"] == {"auroc": 0.70, "auprc": 0.30}
    assert read["local_only_mean"] == {"auroc": 0.62, "auprc": 0.18}
    assert read["points"][0]["alone_at_this_epsilon"] == {"auroc": 0.55, "auprc": 0.125}
    assert read["recommendation"]["epsilon"] == 0.5
    assert read["recommendation"]["fits_default_budget"] is True
    assert (read["delta"], read["colluders"], read["confidence"]) == (1e-6, 4, 0.95)
    assert read["validation"] == {"encounters": 1000, "patients": 700, "positives": 100}
    write_report(found(1), path)
    assert json.loads(path.read_text())["confidence"] is None
