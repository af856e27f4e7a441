"""From a name and options to a method: presets by the student's kind, levels, and mistakes told in one line."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import get_args

import pytest

from detdistill.distillation import methods as room
from detdistill.distillation.method import PairContext
from detdistill.distillation.methods import METHODS, build_method
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models.base import Kind
from detdistill.recipe.methods import MaskOptions, descriptions, option_table, read_options
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
    return PairContext(pair.student, pair.teacher, pair.matching)


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
        context = setting_of(family)
    else:
        pair = Pair(build(family, 16), build(family, 24, seed=1), [])
        context = PairContext(pair.student, pair.teacher, pair.matching)
    student = context.student
    assert student.family == family
    presets = {student.kind: {"alpha": 2.0}, "recommended": {"alpha": 1.0}}
    monkeypatch.setattr(METHODS["mimic"], "presets", presets)
    assert build_method("mimic", context).loss.alpha == 2
    monkeypatch.setitem(presets, family, {"alpha": 3.0})
    assert build_method("mimic", context).loss.alpha == 3


@pytest.mark.parametrize("name", METHODS)
def test_no_preset_is_out_of_reach(name):
    """A key is a family, a kind or "recommended", and chosen by itself; or a recipe must name it."""
    automatic = {*FAMILIES, *get_args(Kind), "recommended"}
    assert METHODS[name].presets.keys() - automatic == NAMED.get(name, set())


def test_a_preset_and_options_over_it():
    context = setting_of("retinanet")
    assert build_method("fgd", context, {"preset": "yolox"}).loss.foreground_weight == 2e-3
    over = build_method("fgd", context, {"preset": "yolox", "tau": 0.7}).loss
    assert (over.foreground_weight, over.tau) == (2e-3, 0.7)
    assert build_method("ima", context).loss.mask.ratio == 0
    assert build_method("ima", context, {"preset": "paper"}).loss.mask.ratio == 0.5


def test_levels_can_be_chosen():
    context = setting_of("fcos")
    chosen = build_method("pkd", context, {"strides": [16, 32]}).align.levels
    assert [level.student_stride for level in chosen] == [16, 32]
    assert [level.student_stride for level in build_method("cwd", context, {"finest": 1}).align.levels] == [8]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pdk", {}, "did you mean 'pkd'"),
        ("pkd", {"alhpa": 1.0}, "did you mean 'alpha'"),
        ("pkd", {"alpha": "much"}, r"pkd: alpha: input should be a valid number \(got 'much'\)"),
        ("pkd", {"alpha": True}, r"pkd: alpha: input should be a valid number \(got True\)"),
        ("pkd", {"preset": "anchors"}, "did you mean 'anchor'"),
        ("pkd", {"strides": [4]}, r"pkd: strides \[4\]: the student's matched strides are \[8, 16, 32\]"),
        ("pkd", {"strides": 8}, r"pkd: strides: must be a list"),
        ("pkd", {"finest": 0}, "pkd: finest: input should be greater than or equal to 1"),
        ("ima", {"mask": {"ratoi": 0.5}}, "'mask.ratoi' of ima's mask; did you mean 'ratio'"),
        ("ima", {"mask": 0.5}, "ima: mask: must be a section"),
        ("dist", {"scores": "softmix"}, "dist: scores: input should be 'sigmoid' or 'softmax'"),
        ("crosskd", {"depth": 9}, "use 1 to 2"),
        ("cwd", {"tau": 0}, "cwd: tau: input should be greater than 0"),
    ],
)
def test_mistakes_are_told_in_one_line(name, options, said):
    with pytest.raises(UserError, match=said) as error:
        build_method(name, setting_of("fcos"), options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_options_and_presets_are_listed(name):
    columns, rows = option_table(METHODS[name])
    assert columns == ["option", "type", "default", *METHODS[name].presets]
    listed = {row[0].partition(".")[0] for row in rows}
    assert listed == METHODS[name].model_fields.keys()
    assert all(key in listed for preset in METHODS[name].presets.values() for key in preset)
    described = descriptions(METHODS[name])
    assert [option for option, _ in described] == [row[0] for row in rows]
    assert all(what for _, what in described)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_has_the_options_defaults(name):
    """A loss in anyone's loop is what a recipe without presets trains by."""
    loss_class = getattr(room, f"{METHODS[name].target.partition(':')[2]}Loss")
    defaults = {key: parameter.default for key, parameter in signature(loss_class).parameters.items()}
    assert defaults
    assert defaults == {key: getattr(METHODS[name](), key) for key in defaults}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_labels_where_its_options_say_so(name):
    module, _, method = METHODS[name].target.partition(":")
    assert METHODS[name].needs_labels == ("labels" in getattr(import_module(module), method).requires)


def test_a_group_of_options_keeps_the_presets_other_keys():
    context = setting_of("fcos")
    literal = build_method("ima", context, {"mask": {"ratio": 0.2}, "preset": "paper"}).loss
    assert literal.mask == MaskOptions(ratio=0.2)
    recommended = build_method("ima", context, {"mask": {"sharing": "batch"}}).loss
    assert recommended.mask == MaskOptions(ratio=0.0, sharing="batch")
    assert build_method("ima", context, {"mask": MaskOptions(sharing="batch")}).loss.mask == recommended.mask
    assert build_method("ima", context, METHODS["ima"](mask={"sharing": "batch"})).loss.alpha == 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"mask_ratio": 0.2, "keep_dc": True}, {"mask": {"ratio": 0.2, "keep_dc": True}}),
        ({"importance": "none", "gamma_min": None}, {"importance": {"kind": "none", "gamma_min": None}}),
        ({"standardize_teacher": False, "eps": 0.1}, {"standardize": {"teacher": False, "eps": 0.1}}),
        ({"mask_teacher": True, "mask": {"ratio": 0.2}}, {"mask": {"ratio": 0.2, "teacher": True}}),
        ({"loss_weight": 2.0}, {"alpha": 200.0}),
        ({"loss_weight": 2.0, "preset": "paper"}, {"preset": "paper", "alpha": 20.0}),
        ({"loss_weight": 0.5, "alpha": 4}, {"alpha": 2.0}),
        ({"loss_weight": 1.0}, {}),
        (
            {"importance_source": "raw", "importance": {"kind": "shifted"}},
            {"importance": {"source": "raw", "kind": "shifted"}},
        ),
    ],
)
def test_the_keys_of_version_0_1_are_read(old, new):
    with pytest.warns(FutureWarning, match=r"^ima: .* deprecated: ") as said:
        options = read_options("ima", old)
    assert options.given == new
    (line,) = (str(each.message) for each in said)
    assert "\n" not in line
    assert all(key in line for key in old.keys() - {"preset", "mask", "alpha"})


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
        context = setting_of("fcos" if name in DETECTION else "pspnet")
        kept = {type(context.student), type(context.teacher)}
        assert not any(type(module) in kept for module in build_method(name, context).modules()), name
