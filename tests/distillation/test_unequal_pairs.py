"""Any detector taught by any other: inputs of unequal size, other classes, heads of other families."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import detection

from detdistill.distillation.alignment import Alignment, read_at, resize_like
from detdistill.distillation.pair import Pair
from detdistill.distillation.regions import boxes_in_cells
from detdistill.errors import UserError
from detdistill.models import Preprocess, build_model, wrap
from detdistill.models.base import Batch

from .pairs import DETECTION, assert_same, snapshot, with_head
from .table_of_pairs import CLASSES, NAMES, PAGE, all_models, build, outcomes, page

SMALL, LARGE = (64, 64), (128, 128)
STRETCHED = Preprocess((96, 128), keep_ratio=False)

CELL_BY_CELL = {"kd", "dist", "gid", "ld"}
"""Methods that compare the outputs of one-stage detectors so; frs does where its cls_weight is not 0."""


def examples(sizes=((61, 90), (80, 50)), classes=3, empty=False):
    """Images of unequal sizes, with boxes, and masks for those that learn from them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    targets = []
    for height, width in sizes:
        boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.4, 0.9, 0.9]]) * torch.tensor([width, height] * 2)
        boxes = boxes[: 0 if empty else 2]
        masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.arange(len(boxes)) % classes
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


def step(pair, inputs=None, scale_factor=1.0):
    """One optimization step; the loss terms."""
    pair.train()
    optimizer = torch.optim.SGD(pair.parameters(), lr=1e-4)
    torch.manual_seed(0)
    losses = pair(*(inputs or examples()), scale_factor)
    sum(losses.values()).backward()
    optimizer.step()
    return losses


# --- every pair of families ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """(students, teachers) of every family, built once; a test that trains a student copies it."""
    pytest.importorskip("transformers", reason="two of the families need transformers")
    return all_models()


@pytest.fixture(scope="module")
def found(models):
    return outcomes(*models)


def check_a_step(student, teacher, method):
    """The student learns, and what is exported is the student alone."""
    student = copy.deepcopy(student)
    before, of_teacher = snapshot(student), snapshot(teacher)
    pair = Pair(student, teacher, [method])
    losses = step(pair)
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    after = snapshot(pair.student)
    assert after.keys() == before.keys()
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert_same(of_teacher, snapshot(teacher))
    exported = snapshot(student.exported)
    assert exported
    assert not {value.data_ptr() for value in exported.values()} & {p.data_ptr() for p in teacher.parameters()}


@pytest.mark.parametrize(("student", "teacher"), list(zip(NAMES, (*NAMES[3:], *NAMES[:3]), strict=True)))
def test_each_family_learns_and_teaches(models, student, teacher):
    check_a_step(models[0][student], models[1][teacher], "ima")


@pytest.mark.long
@pytest.mark.parametrize("teacher", NAMES)
@pytest.mark.parametrize("student", NAMES)
def test_every_pair_takes_a_step(models, student, teacher):
    check_a_step(models[0][student], models[1][teacher], "ima")


@pytest.mark.long
@pytest.mark.parametrize("method", DETECTION)
def test_a_pair_that_is_not_refused_takes_a_step(models, found, method):
    """For methods that refuse some pairs: each family that learns by it, from the last teacher that may."""
    pairs = {student: teacher for (student, teacher), line in found[method].items() if line is None}
    for student, teacher in pairs.items():
        check_a_step(models[0][student], models[1][teacher], method)


def test_the_page_of_pairs_is_up_to_date(found):
    assert PAGE.read_text(encoding="utf-8") == page(found), "python -m tests.distillation.table_of_pairs"


def test_a_refusal_is_one_line_that_says_what_to_do(found):
    lines = {line for cells in found.values() for line in cells.values() if line is not None}
    assert len(lines) > 10
    assert all("\n" not in line and "use " in line for line in lines)


# --- where maps lie --------------------------------------------------------------------------------------


def coordinates(batch: Batch, stride: int) -> torch.Tensor:
    """(N, 2, H, W): of each cell's center, y and x as shares of the image; above 1 in the padding."""
    height, width = batch.padded_size
    y = (torch.arange(height // stride, dtype=torch.float64) + 0.5) * stride
    x = (torch.arange(width // stride, dtype=torch.float64) + 0.5) * stride
    return torch.stack([
        torch.stack(torch.meshgrid(y / h, x / w, indexing="ij")) for h, w in batch.sizes
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "strides"),
    [
        (Preprocess((160, 256)), Preprocess((320, 512)), (8, 16)),
        (Preprocess((160, 256)), Preprocess((320, 512)), (8, 8)),
        (Preprocess((200, 300)), Preprocess((333, 500), divisor=128), (8, 16)),
        (Preprocess((160, 256)), Preprocess((160, 256), divisor=128), (8, 8)),
        (Preprocess((320, 512)), Preprocess((100, 170)), (16, 8)),
        (Preprocess((160, 256)), Preprocess((224, 224), keep_ratio=False), (8, 16)),
        (Preprocess((224, 224), keep_ratio=False), Preprocess((160, 256)), (16, 8)),
        (Preprocess(), Preprocess(divisor=64), (8, 8)),
    ],
)
@pytest.mark.parametrize("scale_factor", [1.0, 0.83])
def test_cells_see_the_same_part_of_each_image(student, teacher, strides, scale_factor):
    """Maps whose values are coordinates: after the overlay they differ by a thousandth of a cell at most."""
    images = [torch.zeros(3, *size) for size in ((97, 130), (200, 61), (128, 128), (75, 211))]
    batches = [preprocess(images, scale_factor=scale_factor) for preprocess in (student, teacher)]
    ours, theirs = (coordinates(batch, stride) for batch, stride in zip(batches, strides, strict=True))
    laid = Alignment(*batches)(ours, theirs)
    assert laid.shape == theirs.shape
    sizes = torch.tensor(batches[1].sizes, dtype=torch.float64)[:, :, None, None]
    cells = (laid - theirs).abs() * sizes / strides[1]
    # Beyond the center of its first or last cell a map is not known: there interpolation repeats that cell.
    inside = (theirs > ours[:, :, :1, :1]) & (theirs < ours[:, :, -1:, -1:])
    assert inside.all(dim=1).flatten(1).sum(dim=1).min() > 20  # of each image
    assert cells[inside].max() < 1e-3


def test_equal_inputs_cost_nothing():
    images = [torch.zeros(3, 97, 130), torch.zeros(3, 64, 200)]
    batch, other = Preprocess((64, 96))(images), Preprocess((64, 96), mean=(0, 0, 0))(images)
    x = torch.randn(2, 4, 5, 6)
    for alignment in (Alignment(batch, batch), Alignment(batch, other)):
        assert alignment(x, torch.zeros(2, 8, 5, 6)) is x
    twice = Preprocess((64, 64))([torch.zeros(3, 64, 64)]), Preprocess((128, 128))([torch.zeros(3, 64, 64)])
    assert torch.equal(Alignment(*twice)(x, torch.zeros(2, 4, 8, 8)), resize_like(x, torch.zeros(2, 4, 8, 8)))


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")), name
        assert name != "aten::index.Tensor" or all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "method"),
    [("fcos", "mimic"), ("fcos", "fgd"), ("gfl", "crosskd")],
)
def test_the_host_never_waits(family, method):
    teacher = build(family, 24, size=LARGE, seed=1, classes=("x", "c", "a"))
    pair = Pair(build(family, 16), teacher, [method]).train()
    seen = []
    pair.methods[method].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pair(*examples())
    step_outputs = seen[0]
    with NoWaiting():
        step_outputs.alignment = Alignment(step_outputs.student_batch, step_outputs.teacher_batch)
        value = pair.methods[method](step_outputs)
    assert value.isfinite()


def test_reading_at_ratio_1_is_resizing_also_in_half_precision():
    x = torch.randn(2, 3, 7, 9)
    wanted = resize_like(x, torch.zeros(2, 3, 14, 12))
    torch.testing.assert_close(read_at(x, (14, 12), torch.ones(2, 2)), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(read_at(x, (14, 12), torch.ones(2, 2)), wanted)
    assert read_at(x.bfloat16(), (14, 12), torch.ones(2, 2)).dtype == torch.bfloat16


def test_boxes_of_objects_are_where_they_are_on_the_teachers_map():
    images, targets = examples()
    small, large = (build("fcos", 16, size=size).preprocess(images, targets) for size in (SMALL, LARGE))
    for batch in (small, large):
        height, width = batch.padded_size
        found = boxes_in_cells(batch, torch.zeros(2, 1, height // 8, width // 8))
        for boxes, (h, w) in zip(found, batch.sizes, strict=True):
            shares = boxes * 8 / torch.tensor([w, h, w, h])
            torch.testing.assert_close(shares[0], torch.tensor([0.1, 0.1, 0.6, 0.7]))


# --- inputs of unequal size ------------------------------------------------------------------------------


def test_levels_meet_by_what_a_cell_covers():
    pair = Pair(build("retinanet", 16), build("retinanet", 24, size=LARGE, seed=1), ["ima"])
    assert [(m.student_stride, m.teacher_stride) for m in pair.matching.levels] == [
        (8, 16), (16, 32), (32, 64), (64, 128),
    ]  # fmt: skip
    assert pair.matching.student_only == (128,)
    assert pair.matching.teacher_only == (8,)
    assert not any(m.resized for m in pair.matching.levels)
    assert "stride 16 (8 of the student's pixels)" in pair.matching.rows()[0][1]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("method", [name for name in DETECTION if name not in CELL_BY_CELL])
def test_a_teacher_that_sees_more_pixels(method, empty):
    options = {"cls_weight": 0.0} if method == "frs" else {}
    pair = Pair(build("fcos", 16), build("fcos", 24, size=LARGE, seed=1), [{method: options}])
    losses = step(pair, examples(empty=empty))
    assert losses[method].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pair.parameters())


@pytest.mark.parametrize("method", ["kd", "dist", "defeat", "scalekd", "mgd"])
@pytest.mark.parametrize("student", ["faster_rcnn", "cascade_rcnn"])
def test_two_stage_detectors_of_unequal_inputs(method, student):
    teacher = build("faster_rcnn", 24, size=LARGE, seed=1)
    assert step(Pair(build(student, 16), teacher, [with_head(method)]))[method].isfinite()


@pytest.mark.parametrize("scale_factor", [0.7, 1.3])
def test_zoom_and_stretched_inputs(scale_factor):
    student, teacher = build("fcos", 16), build("retinanet", 24, seed=1)
    teacher.preprocessor = STRETCHED
    pair = Pair(student, teacher, ["ima", "crosskd"])
    assert all(value.isfinite() for value in step(pair, scale_factor=scale_factor).values())


@pytest.mark.parametrize("method", ["kd", "dist", "gid", "ld", "frs"])
def test_methods_that_go_cell_by_cell_want_equal_inputs(method):
    with pytest.raises(UserError, match=r"use|`size`") as error:
        Pair(build("gfl", 16), build("gfl", 24, size=LARGE, seed=1), [method])
    assert "the inputs differ" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_against_images_as_they_come_is_refused():
    with pytest.raises(UserError, match="give the student a `size`, or the teacher none"):
        Pair(build("fcos", 16, size=None), build("fcos", 24), ["ima"])
    with pytest.raises(UserError, match="give the teacher a `size`, or the student none"):
        Pair(build("fcos", 16), build("fcos", 24, size=None), ["ima"])


def test_regions_are_where_they_are_in_the_teachers_input():
    """By each image's own scales, which rounding makes unequal."""
    pair = Pair(build("faster_rcnn", 16), build("faster_rcnn", 24, size=(150, 170), seed=1), ["kd"]).train()
    seen = []
    classify, predict = pair.teacher.classify, pair.student.forward_head
    pair.teacher.classify = lambda maps, *rest: seen.append(rest) or classify(maps, *rest)
    pair.student.forward_head = lambda maps, batch: seen.append((predict(maps, batch), batch)) or seen[-1][0]
    pair(*examples())
    (outputs, ours), (regions, theirs) = seen
    assert ours.sizes != theirs.sizes
    for mine, other, (h, w), (h_t, w_t) in zip(
        outputs.proposals, regions, ours.sizes, theirs.sizes, strict=True
    ):
        shares = mine / torch.tensor([w, h, w, h])
        torch.testing.assert_close(other / torch.tensor([w_t, h_t, w_t, h_t]), shares, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_sees_the_same_pixels_larger_teaches_the_same():
    """At twice the size and twice the strides, nothing else changed: maps, levels and objects are as before."""

    class Wide(nn.Module):
        """Averages 2×2 pixels: at twice the size it sees what its body saw before."""

        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            pooled = nn.functional.avg_pool2d(x, 2)
            return {2 * stride: value for stride, value in self.body(pooled).items()}

    teacher = build("fcos", 24, seed=1)
    body = nn.Sequential(teacher.backbone, teacher.neck)
    wide = Wide(body)
    taps = {2 * stride: f"body:{stride}" for stride in (8, 16, 32)}
    plain = wrap(body, {stride: f"1:{stride}" for stride in (8, 16, 32)}, Preprocess(SMALL), CLASSES)
    large = wrap(wide, taps, Preprocess(LARGE, divisor=64), CLASSES)
    image = torch.rand(1, 3, 64, 64).repeat_interleave(2, 2).repeat_interleave(2, 3)[0]
    targets = [{"boxes": torch.tensor([[16.0, 20, 90, 100]]), "labels": torch.tensor([1])}]
    values = []
    for taught_by in (plain, large):
        torch.manual_seed(0)
        pair = Pair(build("fcos", 16), taught_by, [{"mimic": {"adapt": "auto"}}, "fgd"]).eval()
        losses = pair([image], targets)
        values.append([losses[name].item() for name in ("mimic", "fgd")])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


# --- classes by name -------------------------------------------------------------------------------------

RESPONSES = [
    ("kd", "fcos"), ("kd", "retinanet"), ("kd", "faster_rcnn"), ("dist", "retinanet"), ("dist", "faster_rcnn"),
    ("gid", "retinanet"), ("ld", "gfl"), ("crosskd", "gfl"), ("defeat", "faster_rcnn"), ("frs", "retinanet"),
    ("maskd", "fcos"), ("maskd", "faster_rcnn"),
]  # fmt: skip


def with_classes(family, classes, rows, source):
    """A detector of these classes, whose class rows are rows of the source's (0…; a random one for None)."""
    model = build(family, source_channels(source), seed=1, classes=classes)
    state, own = dict(source.state_dict()), model.state_dict()
    count = len(source.classes)
    for name, value in own.items():
        theirs = state[name]
        if not name.startswith(("head.cls.", "roi_head.cls.", "roi_head.box.")):
            continue
        background = int(family == "faster_rcnn")
        numbers = 4 if name.startswith("roi_head.box.") else 1
        groups = theirs.shape[0] // ((count + background) * numbers)
        old = theirs.view(groups, count + background, numbers, *theirs.shape[1:])
        new = value.view(groups, len(classes) + background, numbers, *value.shape[1:]).clone()
        if background:
            new[:, 0] = old[:, 0]
        for row, of_source in enumerate(rows):
            if of_source is not None:
                new[:, row + background] = old[:, of_source + background]
        state[name] = new.reshape(value.shape)
    model.load_state_dict(state)
    return model


def source_channels(source):
    return next(iter(source.pyramid_channels.values()))


@pytest.mark.parametrize(("method", "family"), RESPONSES)
def test_order_does_not_matter(method, family):
    teacher = build(family, 24, seed=1)
    shuffled = with_classes(family, ("c", "a", "b"), (2, 0, 1), teacher)
    values = []
    for one in (teacher, shuffled):
        torch.manual_seed(0)
        pair = Pair(build(family, 16), one, [with_head(method)]).train()
        pair.at_step(1, 10)
        torch.manual_seed(0)
        values.append(pair(*examples())[method].item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert values[0] > 0


@pytest.mark.parametrize(("method", "family"), [(m, f) for m, f in RESPONSES if m not in ("maskd", "defeat")])
def test_the_teachers_other_classes_do_not_count(method, family):
    teacher = build(family, 24, seed=1)
    values = []
    for others in (("x",), ("y", "x")):
        one = with_classes(family, (*others, *CLASSES), (*[None] * len(others), 0, 1, 2), teacher)
        torch.manual_seed(0)
        pair = Pair(build(family, 16), one, [method]).train()
        assert pair.classes.extra == others
        torch.manual_seed(0)
        values.append(pair(*examples())[method].item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize(("method", "family"), RESPONSES)
def test_missing_classes_are_told_once_and_the_others_are_taught(method, family, caplog):
    teacher = build(family, 24, seed=1, classes=("b", "z"))
    with caplog.at_level(logging.WARNING, "detdistill"):
        pair = Pair(build(family, 16), teacher, [with_head(method)])
    assert pair.classes.pairs == ((1, 0),)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "does not know a, c" in told[0]
    assert method in told[0]
    caplog.clear()
    losses = step(pair)
    assert losses[method].isfinite()
    assert losses[method].requires_grad
    assert not caplog.records


def test_a_feature_method_says_nothing_of_classes(caplog):
    teacher = build("fcos", 24, seed=1, classes=("x", "y"))
    with caplog.at_level(logging.WARNING, "detdistill"):
        pair = Pair(build("fcos", 16), teacher, ["ima", "fgd", {"frs": {"cls_weight": 0.0}}])
    assert not caplog.records
    assert all(value.isfinite() for value in step(pair).values())


@pytest.mark.parametrize(("method", "family"), RESPONSES)
def test_no_shared_class_is_refused_with_what_would_do(method, family):
    teacher = build(family, 24, seed=1, classes=("x", "y"))
    with pytest.raises(UserError, match=r"none is shared .*: use "):
        Pair(build(family, 16), teacher, [with_head(method)])


def test_gid_without_responses_needs_no_shared_class():
    teacher = build("fcos", 24, seed=1, classes=("x", "y"))
    pair = Pair(build("fcos", 16), teacher, [{"gid": {"cls_weight": 0.0, "box_weight": 0.0}}])
    assert step(pair)["gid"].isfinite()


def test_objects_get_the_teachers_labels_and_those_it_does_not_know_are_left_out():
    teacher = build("fcos", 24, seed=1, classes=("x", "c", "a"))
    classes = Pair(build("fcos", 16), teacher, ["maskd"]).methods["maskd"].classes
    _, targets = examples()
    relabeled = classes.teacher_targets([{**targets[0], "labels": torch.tensor([0, 1])}])[0]
    assert relabeled["labels"].tolist() == [2]
    assert torch.equal(relabeled["boxes"], targets[0]["boxes"][:1])
    assert len(relabeled["masks"]) == 1
    assert targets[0]["labels"].tolist() == [0, 1]


def test_the_choice_of_classes_is_neither_saved_nor_learnt():
    teacher = build("fcos", 24, seed=1, classes=("b", "x"))
    pair = Pair(build("fcos", 16), teacher, ["kd"])
    assert not list(pair.methods.parameters())
    assert not pair.methods.state_dict()


# --- heads that mean the same ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "dist", "defeat"])
@pytest.mark.parametrize("teacher", ["mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_what_is_built_on_faster_rcnn_teaches_it_by_its_first_head(teacher, method):
    taught_by = build(teacher, 24, seed=1)
    losses = step(Pair(build("faster_rcnn", 16), taught_by, [with_head(method)]))
    assert losses[method].item() > 0


def test_torchvisions_own_objects_are_of_the_same_family():
    model = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    teacher = wrap(model, classes=CLASSES, preprocess=Preprocess(SMALL))
    student = build_model("fcos", CLASSES, backbone="mobilenetv3_small_050", channels=16, size=SMALL)
    losses = step(Pair(student, teacher, ["kd", "dist", "crosskd"]))
    assert all(losses[name].isfinite() for name in ("kd", "dist", "crosskd"))


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_other_conventions_place_anchors_elsewhere(family):
    student, teacher = (
        build_model(family, CLASSES, backbone="mobilenetv3_small_050", channels=16, convention=convention)
        for convention in ("torchvision", "mmdet")
    )
    with pytest.raises(UserError, match="the same anchor_scale and convention, or use"):
        Pair(student, teacher, ["kd"])


@pytest.mark.parametrize(("student", "teacher"), [("fcos", "gfl"), ("gfl", "fcos"), ("reppoints", "gfl")])
def test_crosskd_between_families_also_of_unequal_inputs(student, teacher):
    pair = Pair(build(student, 16), build(teacher, 24, size=LARGE, seed=1), ["crosskd"])
    losses = step(pair)
    assert losses["crosskd"].item() > 0
