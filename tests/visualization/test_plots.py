from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detdistill.errors import UserError
from detdistill.evaluation.errors import AREAS, KINDS, RECALLS, ErrorCurves
from detdistill.visualization.plots import ERROR_COLORS, plot_comparison, plot_curves, plot_errors

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


def test_segmentation_has_a_panel_of_its_own(tmp_path):
    rows = [{"step": s, "mIoU": s / 100, "pixel_accuracy": s / 50} for s in (10, 20, 30)]
    plot_curves(rows, tmp_path / "miou.png")
    size(tmp_path / "miou.png")


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


def errors_of(*heights):
    """Flat curves: each kind's precision is the same at every recall; a second class has no objects."""
    precision_K1QR = np.full((len(KINDS), len(AREAS), 2, len(RECALLS)), np.nan)
    precision_K1QR[:, :, 0] = np.array(heights)[:, None, None]
    return ErrorCurves(("dog", "cat"), precision_K1QR, False)


def test_each_kind_of_error_has_an_area_of_its_size(tmp_path):
    curves = errors_of(0.1, 0.3, 0.4, 0.4, 0.5, 0.8, 1.0)
    plot_errors({"alone": curves}, tmp_path / "errors.png")
    with Image.open(tmp_path / "errors.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    counts = {
        kind: int((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum())
        for kind, color in ERROR_COLORS.items()
    }
    # The legend lies on the lower left; the kinds that have an area above it keep their proportions.
    assert counts["BG"] / counts["FN"] == pytest.approx(0.3 / 0.2, rel=0.15)
    assert counts["Sim"] < counts["FN"] / 10  # it costs nothing: only its patch in the legend


def test_classes_without_objects_are_not_drawn(tmp_path):
    curves = errors_of(0.1, 0.3, 0.4, 0.4, 0.5, 0.8, 1.0)
    plot_errors({"a": curves, "b": curves}, tmp_path / "two.png", ["dog", "cat"])
    plot_errors({"a": curves, "b": curves}, tmp_path / "one.png", ["dog"])
    assert size(tmp_path / "two.png") == size(tmp_path / "one.png")
    with pytest.raises(UserError, match="no class has objects"):
        plot_errors({"a": curves}, tmp_path / "none.png", ["cat"])
