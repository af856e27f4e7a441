from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detdistill.config import UserError
from detdistill.report.plots import plot_comparison, plot_curves

LOSSES = [
    {"step": s, "lr": 0.1 / s, "loss": 2.0 / s, "loss/cls": 1.5 / s, "loss/ima": 0.5 / s, "distill_share": 0.25}
    for s in range(1, 40)
]
EVALUATIONS = [{"step": s, "AP": s / 100, "AP50": s / 50} for s in (10, 20, 30)]


def size(path):
    with Image.open(path) as picture:
        assert np.asarray(picture).std() > 5  # something is drawn
        return picture.size


def test_curves_have_a_panel_for_each_thing_that_was_logged(tmp_path):
    plot_curves(LOSSES + EVALUATIONS, tmp_path / "all.png")
    plain = [{key: row[key] for key in ("step", "loss")} for row in LOSSES]
    plot_curves(plain, tmp_path / "plain.png")
    assert size(tmp_path / "all.png")[1] > size(tmp_path / "plain.png")[1]


def test_curves_from_a_csv_file_with_empty_cells(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,AP\n1,2.0,\n2,1.5,\n2,,0.25\n")
    plot_curves(tmp_path / "metrics.csv", tmp_path / "new" / "curves.png")
    size(tmp_path / "new" / "curves.png")


def test_several_runs_in_one_picture(tmp_path):
    plot_comparison({"alone": EVALUATIONS, "distilled": EVALUATIONS[1:], "empty": LOSSES}, tmp_path / "ap.png")
    size(tmp_path / "ap.png")


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(UserError, match="evaluate at least once"):
        plot_comparison({"alone": LOSSES}, tmp_path / "ap.png")
    with pytest.raises(UserError):
        plot_curves([{"step": 1}], tmp_path / "curves.png")
    with pytest.raises(UserError, match=r"missing\.csv"):
        plot_curves(tmp_path / "missing.csv", tmp_path / "curves.png")
