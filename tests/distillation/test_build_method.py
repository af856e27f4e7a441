"""From a name and options to a method: presets by the student's kind, levels, and mistakes told in one line."""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

import pytest

from detdistill.distillation.methods import METHODS, build_method, method_options, option_table
from detdistill.distillation.pair import Pair
from detdistill.distillation.signals import Setting
from detdistill.errors import UserError
from detdistill.models.base import Kind
from detdistill.recipe.models import FAMILIES

from .pairs import DETECTION, make_pair
from .table_of_pairs import SEGMENTERS, build

NAMED = {
    "adversarial": {"cirkd"},
    "cofd": {"cifar"},
    "cwd": {"retinanet_x101"},
    "defeat": {"head"},
    "fgd": {"yolox"},
    "fkd": {"mean"},
    "ifvd": {"cirkd"},
    "ima": {"paper", "literal"},
    "maskd": {"retinanet_x101"},
    "skds": {"cirkd"},
}
"""Presets that only `preset: NAME` chooses."""


@lru_cache
def setting_of(family, **options):
    pair = make_pair([], family, **options)
    return Setting(pair.student, pair.teacher, pair.matching)


def test_a_name_alone_is_the_published_setting_for_the_students_kind():
    anchor, free = (build_method("fgd", setting_of(family)) for family in ("retinanet", "fcos"))
    two_stage = build_method("fgd", setting_of("faster_rcnn", strides=(4, 8, 16, 32, 64)))
    assert (anchor.loss.tau, anchor.loss.foreground_weight) == (0.5, 1e-3)
    assert (free.loss.tau, free.loss.foreground_weight) == (0.8, 1.6e-3)
    assert two_stage.loss.foreground_weight == 5e-5
    assert [level.student_stride for level in two_stage.align.levels] == [4, 8, 16, 32]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_for_a_family_comes_before_that_for_its_kind(family, monkeypatch):
    if family in SEGMENTERS:
        setting = setting_of(family)
    else:
        pair = Pair(build(family, 16), build(family, 24, seed=1), [])
        setting = Setting(pair.student, pair.teacher, pair.matching)
    student = setting.student
    assert student.family == family
    presets = {student.kind: {"alpha": 2.0}, "recommended": {"alpha": 1.0}}
    monkeypatch.setattr(METHODS["mimic"], "presets", presets)
    assert build_method("mimic", setting).loss.alpha == 2
    monkeypatch.setitem(presets, family, {"alpha": 3.0})
    assert build_method("mimic", setting).loss.alpha == 3


@pytest.mark.parametrize("name", METHODS)
def test_no_preset_is_out_of_reach(name):
    """A key is a family, a kind or "recommended", and chosen by itself; or a recipe must name it."""
    automatic = {*FAMILIES, *get_args(Kind), "recommended"}
    assert METHODS[name].presets.keys() - automatic == NAMED.get(name, set())


def test_a_preset_and_options_over_it():
    setting = setting_of("retinanet")
    assert build_method("fgd", setting, {"preset": "yolox"}).loss.foreground_weight == 2e-3
    over = build_method("fgd", setting, {"preset": "yolox", "tau": 0.7}).loss
    assert (over.foreground_weight, over.tau) == (2e-3, 0.7)
    assert build_method("ima", setting).loss.mask_ratio == 0
    assert build_method("ima", setting, {"preset": "paper"}).loss.mask_ratio == 0.5


def test_levels_can_be_chosen():
    setting = setting_of("fcos")
    chosen = build_method("pkd", setting, {"strides": [16, 32]}).align.levels
    assert [level.student_stride for level in chosen] == [16, 32]
    assert [level.student_stride for level in build_method("cwd", setting, {"finest": 1}).align.levels] == [8]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pdk", {}, "did you mean 'pkd'"),
        ("pkd", {"alhpa": 1.0}, "did you mean 'alpha'"),
        ("pkd", {"alpha": "much"}, r"pkd\.alpha is 'much'; give a float"),
        ("pkd", {"alpha": True}, r"pkd\.alpha is True; give a float"),
        ("pkd", {"preset": "anchors"}, "did you mean 'anchor'"),
        ("pkd", {"strides": [4]}, r"pkd: strides \[4\]: the student's matched strides are \[8, 16, 32\]"),
        ("pkd", {"strides": 8}, r"pkd\.strides is 8; give a list"),
        ("pkd", {"finest": 0}, r"pkd: strides \[\]"),
        ("crosskd", {"depth": 9}, "use 1 to 2"),
        ("cwd", {"tau": 0}, "cwd: tau must be above 0"),
    ],
)
def test_mistakes_are_told_in_one_line(name, options, said):
    with pytest.raises(UserError, match=said) as error:
        build_method(name, setting_of("fcos"), options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_options_and_presets_are_listed(name):
    columns, rows = option_table(name)
    assert columns == ["option", "type", "default", *METHODS[name].presets]
    assert {row[0] for row in rows} == {*method_options(name), "preset", "strides", "finest"}
    assert all(key in {row[0] for row in rows} for preset in METHODS[name].presets.values() for key in preset)


def usual_family(name):
    return "retinanet" if name in DETECTION else "pspnet"


@pytest.mark.filterwarnings("ignore:this IMA")  # "literal" warns, as it should
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_for_a_kind_builds_for_it(name):
    """No preset names an option that its method does not have, or a value that it refuses."""
    families = {
        "anchor": "retinanet", "anchor_free": "fcos", "two_stage": "faster_rcnn", "segmentation": "pspnet",
    }  # fmt: skip
    for preset in METHODS[name].presets:
        if name == "ld":  # no family has its head yet
            continue
        build_method(name, setting_of(families.get(preset, usual_family(name))), {"preset": preset})


def test_detectors_are_not_kept():
    """A method that kept a detector would train, save and export it."""
    for name in METHODS.keys() - {"ld"}:
        setting = setting_of("fcos" if name in DETECTION else "pspnet")
        kept = {type(setting.student), type(setting.teacher)}
        assert not any(type(module) in kept for module in build_method(name, setting).modules()), name
