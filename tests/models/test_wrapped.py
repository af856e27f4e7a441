"""Modules of other libraries as detectors: taps, one forward a step, and what is told when a tap is wrong."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import detdistill
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import Preprocess, build_model

from .foreign_models import CLASSES, MmdetLike, YoloLike, yolo_decode, yolo_losses

PLAIN = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
LEVELS = {8: "model.5", 16: "model.6", 32: "model.7"}
NECK = {8: "neck:0", 16: "neck:1"}


def yolo_teacher(width=8):
    torch.manual_seed(1)
    return detdistill.wrap(YoloLike(width), LEVELS, PLAIN)


def yolo_student(width=4):
    torch.manual_seed(2)
    model = YoloLike(width)
    return detdistill.wrap(model, LEVELS, PLAIN, CLASSES, losses=yolo_losses, decode=yolo_decode)


def our_student(channels=8):
    torch.manual_seed(3)
    model = build_model(
        "retinanet",
        CLASSES,
        backbone="resnet10t",
        channels=channels,
        strides=(8, 16, 32),
        head_depth=1,
    )
    model.preprocessor = PLAIN
    return model


def example(n=2, size=64):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(n)]
    boxes = torch.tensor([[4.0, 4, 40, 48], [20, 30, 60, 60]])
    return images, [{"boxes": boxes, "labels": torch.tensor([0, 2])} for _ in range(n)]


def hooks_of(module):
    return [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]


# --- the pyramid -----------------------------------------------------------------------------------------


def test_taps_give_what_the_modules_gave():
    model = YoloLike().eval()
    detector = detdistill.wrap(model, LEVELS, PLAIN)
    assert detector.pyramid_channels == {8: 8, 16: 16, 32: 32}
    batch = detector.preprocess(example()[0])
    images = batch.images_N3HW
    torch.testing.assert_close(images, torch.stack(example()[0]))
    c3 = model.model[0](images)
    c4 = model.model[1](c3)
    c5 = model.model[2](c4)
    p3 = model.model[5](torch.cat([F.interpolate(c4, scale_factor=2), c3], 1))
    wanted = {8: p3, 16: model.model[6](c4), 32: model.model[7](c5)}
    for pyramid in (detector.forward_features(batch), detector.forward_features_only(batch)):
        assert list(pyramid) == [8, 16, 32]
        for stride, x in pyramid.items():
            assert torch.equal(x, wanted[stride])


def test_an_item_of_a_tuple_or_a_dict():
    assert detdistill.wrap(MmdetLike(), NECK, PLAIN).pyramid_channels == {8: 12, 16: 12}

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = MmdetLike().backbone

        def forward(self, x):
            c3, c4 = self.body(x)
            return {"p3": c3, 4: [c4]}

    tapped = detdistill.wrap(Named(), {8: ":p3", 16: ":4:0"}, PLAIN)  # the module itself has the empty name
    assert tapped.pyramid_channels == {8: 8, 16: 16}


def test_a_teacher_runs_no_further_than_its_last_tap():
    """In 5 steps of a pair the head of the teacher is called not once; in 5 whole forwards 5 times."""
    for detector, head in (
        ((yolo := yolo_teacher()), yolo.model.model[-1]),
        ((mmdet := detdistill.wrap(MmdetLike(), NECK, PLAIN)), mmdet.model.bbox_head),
    ):
        head.calls = 0
        pair = Pair(our_student(), detector, ["ima"])
        for _ in range(5):
            pair(*example())
        assert head.calls == 0
        batch = detector.preprocess(example()[0])
        for _ in range(5):
            detector.forward_features(batch)
        assert head.calls == 5


def test_a_model_that_swallows_exceptions_still_stops():
    class Careful(MmdetLike):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            features = None
            try:
                features = self.extract_feat(inputs)
            except Exception:
                self.swallowed = True
            return self.bbox_head(features)

    model = Careful()
    detector = detdistill.wrap(model, NECK, PLAIN)
    model.bbox_head.calls = 0
    detector.forward_features_only(detector.preprocess(example()[0]))
    assert model.bbox_head.calls == 0
    assert not hasattr(model, "swallowed")


def test_nothing_stays_on_the_model():
    detector = yolo_teacher()
    batch = detector.preprocess(example()[0])
    seen = weakref.ref(detector.forward_features(batch)[8])
    detector.forward_features_only(batch)
    gc.collect()
    assert seen() is None
    assert not hooks_of(detector)
    # Nor after a forward that fails on the way.
    broken = copy.deepcopy(detector)
    broken.model.model[6].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.forward_features(batch)
    assert not hooks_of(broken)


def test_building_changes_nothing():
    model = YoloLike()
    model.model[3].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    detdistill.wrap(model, LEVELS, PLAIN)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_copies_are_of_their_own():
    detector = yolo_student()
    other = copy.deepcopy(detector)
    batch = detector.preprocess(example()[0])
    for parameter in other.model.parameters():
        parameter.data.zero_()
    assert other.forward_features(batch)[8].abs().max() == 0
    assert detector.forward_features(batch)[8].abs().max() > 0
    assert other.to(torch.float64).forward_features(_double(batch))[8].dtype == torch.float64


def _double(batch):
    return type(batch)(batch.images_N3HW.double(), batch.sizes, batch.original_sizes, batch.targets)


def test_gradient_and_autocast_go_through_taps():
    detector = yolo_student()
    batch = detector.preprocess(*example())
    pyramid = detector.forward_features(batch)
    sum(x.sum() for x in pyramid.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in detector.model.model[0].parameters() if p.ndim == 4)
    with torch.autocast("cpu", torch.bfloat16):
        halves = detector.forward_features(batch)
        detector.forward_features_only(batch)
    assert all(torch.isfinite(x).all() for x in halves.values())
    torch.testing.assert_close(halves[8].float(), pyramid[8].float(), atol=0.1, rtol=0.1)
    with torch.inference_mode():
        assert detector.forward_features(batch)[8].shape == pyramid[8].shape


# --- wrong taps ------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.act = nn.Conv2d(3, 4, 8, 8), nn.ReLU(inplace=True)
        self.shared, self.spare, self.turned = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Identity()

    def forward(self, x):
        x = self.act(self.down(x))
        return self.turned(self.shared(self.shared(x)).mT)


@pytest.mark.parametrize(
    ("model", "taps", "message"),
    [
        (YoloLike, {8: "model.15"}, r"tap 8: the model has no module 'model.15'; near are model.5"),
        (YoloLike, {8: "model.6"}, r"tap 8: 'model.6' gives 4×8 cells of .* 64×128 .* stride of 16, not 8"),
        (YoloLike, {8: "model.8"}, r"tap 8: 'model.8' gives a tuple of 2 .*choose one, as 'model.8:0'"),
        (YoloLike, {8: "model.8:0"}, r"'model.8:0' gives a tensor \(1, 7, 168\), not \(N, C, H, W\)"),
        (YoloLike, {16: "model.1.1"}, r"tap 16: a later layer overwrites the map of 'model.1.1' in place"),
        (MmdetLike, {8: "neck:7"}, r"tap 8: 'neck' gives a tuple of 2 .*has no item '7'"),
        (MmdetLike, {8: "neck:p3"}, r"has no item 'p3'"),
        (Odd, {8: "spare"}, r"tap 8: 'spare' did not run when the model was called"),
        (Odd, {8: "shared"}, r"tap 'shared' runs more than once"),
        (Odd, {8: "turned"}, r"gives 16×8 cells of an input of 64×128 pixels, which is a stride of 4 and 16"),
        (Odd, {}, r"taps is empty"),
    ],
)  # fmt: skip
def test_wrong_taps_are_told_at_once_in_one_line(model, taps, message):
    with pytest.raises(UserError, match=message) as error:
        detdistill.wrap(model(), taps, PLAIN)
    assert "\n" not in str(error.value)


def test_what_else_is_told_at_once():
    with pytest.raises(UserError, match=r"YoloLike has steps of its own: give taps"):
        detdistill.wrap(YoloLike())
    with pytest.raises(UserError, match="call goes with taps"):
        detdistill.wrap(YoloLike(), call=lambda model, images, batch: model(images))
    with pytest.raises(UserError, match="preprocess is missing"):
        detdistill.wrap(YoloLike(), LEVELS)
    with pytest.raises(UserError, match="classes is missing"):
        detdistill.wrap(YoloLike(), LEVELS, PLAIN, losses=lambda model, output, batch: {})

    class Wants(MmdetLike):
        def forward(self, inputs, data_samples):
            return self.extract_feat(inputs)

    with pytest.raises(UserError, match=r"cannot be called with images .*data_samples.*give call="):
        detdistill.wrap(Wants(), NECK, PLAIN)
    called = detdistill.wrap(Wants(), NECK, PLAIN, call=lambda model, images, batch: model(images, None))
    assert called.pyramid_channels == {8: 12, 16: 12}


class Program(nn.Module):
    """As Ultralytics' YOLO: a module whose ``train`` trains, and begins to do so in ``eval``."""

    def __init__(self):
        super().__init__()
        self.model = YoloLike()

    def train(self, trainer=None, **options):
        raise AssertionError("a training of its own has begun")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yolo.pt", LEVELS, PLAIN), "a str is no module"),
        ((Program(), {8: "model.model.5"}, PLAIN), r"Program is a program around a module .*`model.model`"),
        ((our_student(), LEVELS, PLAIN), "a RetinaNet of detdistill needs no wrap"),
        ((YoloLike(), ["model.5"], PLAIN), "taps is a list: give"),
        ((YoloLike(), {"8": "model.5"}, PLAIN), "taps has '8': model.5: give"),
        ((YoloLike(), {8: nn.Conv2d(1, 1, 1)}, PLAIN), "taps has 8: a Conv2d: give"),
        ((YoloLike(), LEVELS, {"size": (64, 64)}), "preprocess is a dict: give detdistill.Preprocess"),
        ((YoloLike(), LEVELS, PLAIN, "person"), r"classes is the word 'person': give a list .*\['person'\]"),
        ((YoloLike().half(), LEVELS, PLAIN), r"its weights are float16: give model.float\(\)"),
    ],
)  # fmt: skip
def test_what_is_no_argument_of_wrap_is_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        detdistill.wrap(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_module_in_one_piece_is_told():
    with pytest.raises(UserError, match="a scripted or traced module runs as one piece"):
        detdistill.wrap(torch.jit.trace(nn.Conv2d(3, 4, 8, 8), torch.zeros(1, 3, 64, 64)), {8: ""}, PLAIN)


class Resizing(nn.Module):
    """A map of its own size, whatever the input's."""

    def __init__(self):
        super().__init__()
        self.down, self.map = nn.Conv2d(3, 8, 8, 8), nn.Identity()

    def forward(self, x):
        return self.map(F.interpolate(self.down(x), (8, 16)))


class Moulting(Resizing):
    """As many channels as suit the input."""

    def forward(self, x):
        return self.map(self.down(x)[:, : 8 if x.shape[-1] == 128 else 4])


@pytest.mark.parametrize("build", [Resizing, Moulting])
def test_a_map_that_does_not_follow_the_input_is_told(build):
    detector = detdistill.wrap(build(), {8: "map"}, PLAIN)
    with pytest.raises(UserError, match=r"tap 8: 'map' gives .* of an input of 96×96 pixels, not 8 channels"):
        detector.forward_features_only(detector.preprocess(example(size=96)[0]))


def test_sides_that_a_stride_does_not_divide_may_be_rounded_either_way():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 32, 32), nn.Conv2d(3, 4, 33, 32, padding=16)

        def forward(self, x):
            return self.down(x), self.up(x)

    for tap, cells in (("down", 2), ("up", 3)):
        detector = detdistill.wrap(Both(), {32: tap}, Preprocess(divisor=16))
        assert detector.forward_features(detector.preprocess(example(size=80)[0]))[32].shape[-1] == cells


def test_a_tap_that_is_not_filled_in_this_very_forward_is_an_error():
    class Moody(MmdetLike):
        skip = False

        def forward(self, inputs):
            return self.backbone(inputs) if self.skip else self.neck(self.backbone(inputs))

    model = Moody()
    detector = detdistill.wrap(model, NECK, PLAIN)
    batch = detector.preprocess(example()[0])
    detector.forward_features(batch)
    model.skip = True
    for look in (detector.forward_features, detector.forward_features_only):
        with pytest.raises(UserError, match="'neck' did not run"):
            look(batch)


# --- as a teacher ----------------------------------------------------------------------------------------


def test_methods_on_predictions_are_refused_when_the_pair_is_built():
    for method in ("kd", "ld", "dist", "gid", "crosskd", "frs", "scalekd"):
        for student, teacher in ((our_student(), yolo_teacher()), (yolo_student(), yolo_teacher())):
            with pytest.raises(UserError, match=method) as error:
                Pair(student, teacher, [method])
            assert "\n" not in str(error.value)


def test_a_student_without_losses_is_refused_when_the_pair_is_built():
    with pytest.raises(UserError, match=r"no losses: give wrap\(..., losses=...\)"):
        Pair(yolo_teacher(), our_student(), ["ima"])


def test_a_student_that_is_frozen_is_refused_when_the_pair_is_built():
    """As models are that were saved frozen, or were a teacher before."""
    for build in (yolo_student, our_student):
        student = build().requires_grad_(False)
        for teacher in (yolo_teacher(), None):
            with pytest.raises(UserError, match=r"call requires_grad_\(True\)"):
                Pair(student, teacher, ["ima"] if teacher else [])
    student = yolo_student()
    for teacher in (student, detdistill.wrap(student.model, LEVELS, PLAIN)):
        with pytest.raises(UserError, match="one module: give the teacher a copy"):
            Pair(student, teacher, ["ima"])
    assert all(parameter.requires_grad for parameter in student.parameters())


def one_step(student, teacher, methods):
    pair = Pair(student, teacher, methods).train()
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)
    frozen = copy.deepcopy(teacher.state_dict())
    before = {name: value.clone() for name, value in student.named_parameters()}
    losses = pair(*example())
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    return losses, [name for name, value in student.named_parameters() if not torch.equal(value, before[name])]


def test_a_wrapped_teacher_teaches_our_student():
    losses, moved = one_step(our_student(), yolo_teacher(), ["ima"])
    assert losses["ima"] > 0
    assert "backbone.body.conv1.0.weight" in moved


def test_our_teacher_teaches_a_wrapped_student():
    student = yolo_student()
    losses, moved = one_step(student, our_student(channels=16), ["ima"])
    assert set(losses) == {"box", "cls", "dfl", "ima"}
    assert losses["ima"] > 0
    assert {"model.model.0.0.0.weight", "model.model.8.cv2.0.weight"} <= set(moved)


@pytest.mark.parametrize(
    "method", ["ima", "mimic", "pkd", "cwd", "fgd", "mgd", "fgfi", "at", "skd", "cofd", "fkd"]
)
def test_methods_on_features_take_any_pair_of_foreign_models(method):
    losses, _ = one_step(yolo_student(), yolo_teacher(), [method])
    assert torch.isfinite(losses[method])


def test_colors_and_ranges_of_other_libraries():
    """Caffe's networks take blue, green, red in 0…255 less their mean; letterboxes are filled with gray."""
    mean = (123.675, 116.28, 103.53)
    caffe = Preprocess(mean=tuple(m / 255 for m in mean), std=(1 / 255,) * 3, bgr=True, divisor=32)
    pixels = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)
    seen = caffe([pixels]).images_N3HW[0]
    wanted = pixels.flip(0).float() - torch.tensor(mean[::-1])[:, None, None]
    torch.testing.assert_close(seen[:, :40], wanted, atol=1e-3, rtol=0)
    assert seen[:, 40:].abs().max() == 0
    gray = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), fill=114 / 255)([pixels]).images_N3HW[0]
    torch.testing.assert_close(gray[:, :40], pixels / 255)
    assert (gray[:, 40:] == 114 / 255).all()


# --- as a student ----------------------------------------------------------------------------------------


def test_a_student_runs_once_in_a_step():
    student = yolo_student()
    head = student.model.model[-1]
    head.calls = 0
    Pair(student, our_student(), ["ima"]).train()(*example())
    assert head.calls == 1
    student.eval()
    student(example()[0])
    assert head.calls == 2


def test_losses_are_the_models_own():
    student = yolo_student().train()
    images, targets = example()
    losses = student(images, targets)
    theirs = {
        "img": torch.stack(images),
        "bboxes": torch.tensor([[22.0, 26, 36, 44], [40, 45, 40, 30]] * 2) / 64,
        "cls": torch.tensor([[0.0], [2], [0], [2]]),
        "batch_idx": torch.tensor([0.0, 0, 1, 1]),
    }
    torch.testing.assert_close(torch.stack(list(losses.values())), student.model.loss(theirs)[0] / 2)


def test_detections_are_in_pixels_of_the_image_that_was_given():
    sized = Preprocess(size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1))

    def decode(model, output, batch):
        box = torch.tensor([[8.0, 4, 40, 30], [0, 0, 99, 99]])
        return [{"boxes": box, "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.2, 0.9])}]

    student = detdistill.wrap(YoloLike(), LEVELS, sized, CLASSES, decode=decode).eval()
    found = student([torch.rand(3, 32, 128)])[0]  # becomes 16 × 64
    assert found["labels"].tolist() == [0, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.2])
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, 128, 32], [16, 8, 80, 32]]))


def test_a_copy_hands_its_own_model_to_the_functions():
    """An average over training is a copy: its losses and detections must not be the original's."""
    seen = []

    def losses(model, output, batch):
        seen.append(model)
        return {"sum": sum(x.sum() for x in model.parameters())}

    def decode(model, output, batch):
        seen.append(model)
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]

    student = detdistill.wrap(YoloLike(), LEVELS, PLAIN, CLASSES, losses=losses, decode=decode)
    again = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(1)
    images, targets = example()
    total = again.train()(images[:1], targets[:1])["sum"]
    assert total == sum(parameter.numel() for parameter in again.parameters())
    again.eval()(images[:1])
    assert all(model is again.model for model in seen)


def test_wrong_losses_are_told():
    for losses, seen in (
        (lambda model, output, batch: output[0].sum(), r"a tensor \(\)"),
        (lambda model, output, batch: {"box": output[0].flatten()}, r"a dict of 1"),
    ):
        student = detdistill.wrap(YoloLike(), LEVELS, PLAIN, CLASSES, losses=losses).train()
        with pytest.raises(UserError, match=seen):
            student(*example())
    with pytest.raises(UserError, match="no detections: give"):
        yolo_teacher().eval()(example()[0])


@pytest.mark.parametrize("losses", [lambda *_: {}, lambda _, output, __: {"box": output[0].sum().detach()}])
def test_losses_without_a_gradient_are_refused(losses):
    student = detdistill.wrap(YoloLike(), LEVELS, PLAIN, CLASSES, losses=losses)
    for pair in (Pair(student), Pair(student, our_student(), ["mimic"])):
        with pytest.raises(UserError, match="loss has no gradient"):
            pair.train()(*example())


BOX = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0]), "scores": torch.ones(1)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "a NoneType: return a list"),
        ([BOX], r"a list of 1 .*each of the 2 images"),
        ([BOX, {"boxes": torch.zeros(0, 4)}], r"a dict of 1 .*return a dict of boxes, labels and scores"),
        ([{**BOX, "boxes": torch.zeros(2, 4)}] * 2, r"return boxes \(K, 4\)"),
        ([{**BOX, "labels": torch.tensor([0.0])}] * 2, r"labels \(K,\) of integers"),
        ([{**BOX, "labels": torch.tensor([79])}] * 2, "labels 79 to 79, and there are 3 classes"),
        ([{**BOX, "labels": torch.tensor([-1])}] * 2, "labels -1 to -1"),
        ([{**BOX, "boxes": torch.zeros(1, 4).numpy()}] * 2, r"boxes as .*return tensors, as torch.from_numpy"),
        ([{**BOX, "scores": [1.0]}] * 2, r"scores as .*return tensors"),
    ],
)  # fmt: skip
def test_wrong_detections_are_told(found, message):
    student = detdistill.wrap(YoloLike(), LEVELS, PLAIN, CLASSES, decode=lambda model, output, batch: found)
    with pytest.raises(UserError, match=message) as error:
        student.eval()(example()[0])
    assert "\n" not in str(error.value)


# --- several processes -----------------------------------------------------------------------------------


def losses_of_mmdet(model, output, batch):
    return {"cls": sum(x.sigmoid().mean() for x in output[0]), "box": sum(x.abs().mean() for x in output[1])}


def test_a_pair_can_be_sent_to_another_process():
    torch.manual_seed(0)
    student = detdistill.wrap(MmdetLike(), NECK, PLAIN, CLASSES, losses=losses_of_mmdet)
    pair = Pair(student, yolo_teacher(), ["ima"])
    pair(*example())
    assert not hooks_of(pair)
    if __name__ in sys.modules:  # the loss is found by its name
        again = pickle.loads(pickle.dumps(pair.teacher))
        batch = pair.teacher.preprocess(example()[0])
        assert torch.equal(again.forward_features(batch)[8], pair.teacher.forward_features(batch)[8])


WORKER = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[5])
from foreign_models import CLASSES, YoloLike, yolo_losses
import detdistill
from detdistill.models import Preprocess, build_model

world, rank, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
plain = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
levels = {8: "model.5", 16: "model.6", 32: "model.7"}
images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
targets = [{"boxes": torch.tensor([[4.0, 4, 40, 48]]), "labels": torch.tensor([i])} for i in range(2)]
mine = [i for i in range(2) if i % world == rank]
gradients = []
torch.manual_seed(1)
options = {"channels": 8, "strides": (8, 16, 32), "head_depth": 1, "norm": "frozen"}
ours = [build_model("retinanet", CLASSES, backbone="resnet10t", **options) for _ in range(2)]
for model in ours:
    model.preprocessor = plain
yolo = YoloLike(4)
students = [
    (ours[0], detdistill.wrap(YoloLike(8), levels, plain)),
    (detdistill.wrap(yolo, levels, plain, CLASSES, losses=yolo_losses), ours[1]),
]
for student, teacher in students:
    pair = detdistill.Pair(student, teacher, ["mimic"]).train()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model = DistributedDataParallel(pair)
    for _ in range(2):
        model.zero_grad()
        losses = model([images[i] for i in mine], [targets[i] for i in mine])
        sum(losses.values()).backward()
    gradients += [p.grad for p in pair.parameters() if p.grad is not None]
if rank == 0:
    torch.save(gradients, out)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    outputs = []
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{world}.pt"
        arguments = [str(port), str(out), str(Path(__file__).parent)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "worker.py"), str(world), str(rank), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in processes] == [0] * world
        outputs.append(torch.load(out, weights_only=True))
    assert len(outputs[0]) > 20
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6 + 1e-4 * one.abs().max().item())
