"""torchvision's own detector objects in five steps: the losses and detections of their own ``forward``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import detdistill
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import Preprocess, build_model
from detdistill.models.checkpoints.torchvision import COCO_CATEGORIES

from .test_torchvision_parity import randomize

CLASSES = ("cat", "dog", "bird")
SIZE = {"min_size": 64, "max_size": 96}


def resnet(levels="p6p7"):
    if levels == "pool":
        return resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )


def ours(family, **options):
    return build_model(family, CLASSES, backbone="resnet10t", channels=16, head_depth=1, **options)


def retinanet(**options):
    return detection.RetinaNet(resnet(), len(CLASSES) + 1, **SIZE, **options)


def retinanet_v2():
    """As ``retinanet_resnet50_fpn_v2``: ATSS-like anchors, GroupNorm towers, GIoU."""
    v2 = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4, **SIZE)
    v2.backbone = resnet()
    return v2


def fcos_object():
    return detection.FCOS(resnet(), len(CLASSES) + 1, **SIZE)


def faster_rcnn(**options):
    return detection.FasterRCNN(resnet("pool"), len(CLASSES) + 1, **SIZE, **options)


def faster_rcnn_v2():
    v2 = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4, **SIZE)
    v2.backbone = resnet("pool")
    return v2


def faster_rcnn_mobile():
    return detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=4, **SIZE
    )


def mask_rcnn():
    return detection.MaskRCNN(resnet("pool"), len(CLASSES) + 1, **SIZE)


def ssdlite():
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


def ssd300():
    return detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)


DENSE = (retinanet, retinanet_v2, fcos_object)
TWO_STAGE = (faster_rcnn, faster_rcnn_v2, faster_rcnn_mobile, mask_rcnn)


def make(build):
    torch.manual_seed(0)
    model = build()
    randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith("cls_logits.bias"):  # so that some score is above the threshold
            nn.init.constant_(parameter, -1.0)
    if isinstance(model, detection.FasterRCNN):  # fewer regions than 2000, to be quick
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 60, "testing": 40}
        model.roi_heads.detections_per_img = 20
    return model


def example(shift=0):
    """Images of unequal sizes, one of them without objects; labels from 0, or from ``shift``."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((96, 128), (120, 96))]
    boxes = [torch.tensor([[8.0, 8, 60, 70], [50, 30, 110, 90]]), torch.zeros(0, 4)]
    return images, [
        {
            "boxes": box,
            "labels": torch.arange(len(box)) * 2 + shift,
            "masks": torch.ones(len(box), *image.shape[1:], dtype=torch.uint8),
        }
        for box, image in zip(boxes, images, strict=True)
    ]


@pytest.mark.parametrize("build", [*DENSE, *TWO_STAGE], ids=lambda build: build.__name__)
def test_losses_and_detections_are_the_objects_own(build):
    theirs = make(build)
    ours = detdistill.wrap(theirs, classes=CLASSES)
    assert ours.classes == CLASSES
    theirs.train()
    torch.manual_seed(3)
    wanted = theirs(*example(shift=1))
    torch.manual_seed(3)
    for _ in example()[0]:  # torchvision draws each image's size, if only from one
        torch.empty(1).uniform_()
    got = ours.train()(*example())
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(got.values()).requires_grad

    theirs.eval()
    with torch.no_grad():
        wanted, got = theirs(example()[0]), ours.eval()(example()[0])
    assert sum(len(one["boxes"]) for one in got) > 5
    for one, two in zip(got, wanted, strict=True):
        kept = two["labels"] > 0  # a dense head of torchvision also answers "background"
        assert one.keys() == two.keys()
        assert torch.equal(one["labels"], two["labels"][kept] - 1)
        for name in one.keys() - {"labels"}:
            torch.testing.assert_close(one[name], two[name][kept], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "size", "channels"),
    [
        (ssdlite, (320, 320), {16: 672, 32: 480, 64: 512}),
        (ssd300, (300, 300), {8: 512, 16: 1024, 32: 512, 64: 256}),
    ],
)
def test_an_ssd(build, size, channels):
    """Losses and detections are the object's own, for images that need no stretching."""
    torch.manual_seed(0)
    theirs = build()
    ours = detdistill.wrap(theirs, classes=CLASSES)
    assert ours.pyramid_channels == channels
    assert ours.preprocessor.size == size
    assert not ours.preprocessor.keep_ratio
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    boxes = torch.tensor([[20.0, 30, 200, 250], [100, 60, 260, 140]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([0, 2])},
        {"boxes": boxes[:0], "labels": torch.tensor([0, 2])[:0]},
    ]
    state = copy.deepcopy(theirs.state_dict())
    torch.manual_seed(3)
    wanted = theirs.train()(images, [{**target, "labels": target["labels"] + 1} for target in targets])
    theirs.load_state_dict(state)
    torch.manual_seed(3)
    got = ours.train()(images, targets)
    assert got.keys() == wanted.keys() == {"bbox_regression", "classification"}
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    sum(got.values()).backward()

    ours.eval()
    with torch.no_grad():
        for own, found in zip(theirs(images), ours(images), strict=True):
            kept = own["labels"] > 0
            assert kept.sum() > 20
            torch.testing.assert_close(found["boxes"], own["boxes"][kept], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(found["scores"], own["scores"][kept], rtol=1e-4, atol=1e-5)
            assert torch.equal(found["labels"], own["labels"][kept] - 1)
        (twice,) = ours([torch.nn.functional.interpolate(images[0][None], scale_factor=2)[0]])
    assert twice["boxes"].max() > max(size)  # in pixels of the image that was given


def test_an_ssd_teaches_and_learns():
    student, teacher = (detdistill.wrap(ssdlite(), classes=CLASSES) for _ in range(2))
    small = ours("fcos", strides=(8, 16, 32), size=128)
    for learner, master in ((student, small), (small, teacher), (student, teacher)):
        losses = Pair(learner.requires_grad_(True), master, ["ima"]).train()(*example())
        assert losses["ima"] > 0
        sum(losses.values()).backward()
    with pytest.raises(UserError, match="kd compares predictions"):
        Pair(student, teacher, ["kd"])


@pytest.mark.parametrize("build", DENSE, ids=lambda build: build.__name__)
def test_raw_predictions_are_maps_as_our_families_have_them(build):
    """From the maps alone our own choice of detections finds what the object finds."""
    theirs = make(build).eval()
    ours = detdistill.wrap(theirs, classes=CLASSES).eval()
    with torch.no_grad():
        batch = ours.preprocess(example()[0])
        head_outputs = ours.forward_head(ours.forward_features(batch), batch)
        outputs = theirs.head([*ours.forward_features(batch).values()])
    anchors = theirs.anchor_generator.num_anchors_per_location()[0]
    assert list(head_outputs.cls) == list(ours.pyramid_channels) == [8, 16, 32, 64, 128]
    assert head_outputs.cls[8].shape == (2, anchors * len(CLASSES), 12, 12)
    logits = torch.cat(
        [x.unflatten(1, (-1, 3)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in head_outputs.cls.values()], 1
    )
    torch.testing.assert_close(logits, outputs["cls_logits"][..., 1:])
    boxes = torch.cat(
        [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in head_outputs.box.values()], 1
    )
    torch.testing.assert_close(boxes, outputs["bbox_regression"])
    tower_features = ours.forward_head(ours.forward_features(batch), batch, tower_features=True)
    torch.testing.assert_close(tower_features.cls[8], head_outputs.cls[8])
    assert len(tower_features.tower_features) == ours.head.depth == 4
    for i, one in enumerate(super(type(ours).__mro__[1], ours).decode(head_outputs, batch)):
        own = ours.decode(head_outputs, batch)[i]
        n = min(len(own["boxes"]), 20)
        torch.testing.assert_close(one["scores"][:n], own["scores"][:n], rtol=1e-4, atol=1e-5)


def test_classes_of_torchvisions_weights_and_of_a_head_without_background():
    coco = detdistill.wrap(make(lambda: detection.RetinaNet(resnet(), 91, **SIZE)))
    assert coco.classes == COCO_CATEGORIES[1:]
    same = detdistill.wrap(coco.model, classes=detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    assert same.classes == coco.classes
    theirs = make(lambda: detection.RetinaNet(resnet(), 3, **SIZE)).train()  # labels from 0, as many do
    ours = detdistill.wrap(theirs, classes=CLASSES)
    wanted, got = theirs(*example()), ours(*example())
    torch.testing.assert_close(got["classification"], wanted["classification"])
    with pytest.raises(UserError, match=r"4 class rows.*give classes= with 3 names, not 2"):
        detdistill.wrap(make(retinanet), classes=("a", "b"))
    with pytest.raises(UserError, match=r"4 class rows.*give classes= with 3 names$"):
        detdistill.wrap(make(faster_rcnn))
    with pytest.raises(UserError, match="not 4"):
        detdistill.wrap(make(faster_rcnn), classes=("a", "b", "c", "d"))


def test_the_input_is_the_objects_own_unless_another_is_given():
    model = detection.FCOS(
        resnet(), 4, min_size=(64, 80), max_size=100, image_mean=[0.5] * 3, image_std=[0.2] * 3
    )
    detector = detdistill.wrap(model, classes=CLASSES)
    assert detector.preprocessor == Preprocess((80, 100), (0.5,) * 3, (0.2,) * 3, 32)
    other = Preprocess(size=(64, 64))
    assert detdistill.wrap(model, None, other, CLASSES).preprocessor == other


def test_two_levels_of_one_stride():
    detector = detdistill.wrap(make(faster_rcnn_mobile), classes=CLASSES)
    assert detector.pyramid_channels == {32: 256, 64: 256}
    backbone = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    dense = detection.RetinaNet(backbone, 4, anchor_generator=faster_rcnn_mobile().rpn.anchor_generator)
    with pytest.raises(UserError, match=r"strides \[32, 32, 64\]"):
        detdistill.wrap(dense, classes=CLASSES)


def test_other_objects_are_refused_with_what_to_do():
    keypoints = detection.KeypointRCNN(resnet("pool"), 2)
    with pytest.raises(UserError, match="keypoints are not learnt here: give taps"):
        detdistill.wrap(keypoints, classes=("person",))
    tapped = detdistill.wrap(
        keypoints,
        {4: "backbone:0", 8: "backbone:1"},
        Preprocess(),
        call=lambda model, images, batch: model.backbone(images),
    )
    assert tapped.pyramid_channels == {4: 256, 8: 256}
    ssd = ssdlite()
    ssd.head = nn.Identity()
    with pytest.raises(UserError, match="the head of this SSD is not torchvision's own"):
        detdistill.wrap(ssd, classes=CLASSES)
    ssd = ssdlite()
    ssd.transform.fixed_size = None
    with pytest.raises(UserError, match="no fixed_size to stretch images to: give preprocess"):
        detdistill.wrap(ssd, classes=CLASSES)

    class Head(nn.Module):
        classification_head = regression_head = nn.Identity()

    with pytest.raises(UserError, match="the head of this RetinaNet is not torchvision's own"):
        detdistill.wrap(detection.RetinaNet(resnet(), 4, head=Head()), classes=CLASSES)


def test_images_without_objects_and_bf16_give_finite_losses():
    images, targets = example()
    empty = [
        {**target, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        for target in targets
    ]
    for build in (*DENSE, faster_rcnn):
        detector = detdistill.wrap(make(build), classes=CLASSES).train()
        for them in (targets, empty):
            with torch.autocast("cpu", torch.bfloat16):
                losses = detector(images, them)
            assert all(torch.isfinite(value) for value in losses.values()), build.__name__


def test_averages_and_exports_know_each_layer_once():
    model = make(retinanet)
    detector = detdistill.wrap(model, classes=CLASSES)
    assert detector.exported is model
    assert set(detector.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    other = copy.deepcopy(detector)
    nn.init.zeros_(other.model.head.classification_head.cls_logits.weight)
    assert other.head.cls is other.model.head.classification_head.cls_logits
    assert detector.head.cls.weight.abs().max() > 0


@pytest.mark.parametrize("method", ["ima", "kd", "gid", "dist", "crosskd", "scalekd"])
def test_a_pair_of_retinanet_objects_learns_from_predictions(method):
    student, teacher = (detdistill.wrap(make(retinanet), classes=CLASSES) for _ in range(2))
    torch.manual_seed(9)
    for part in (student.model.head, student.model.backbone.fpn):
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    pair = Pair(student, teacher, [method]).train()
    losses = pair(*example())
    assert losses[method] > 0
    losses[method].backward()
    assert student.model.backbone.fpn.inner_blocks[0][0].weight.grad.abs().max() > 0


def test_a_torchvision_teacher_and_our_student():
    teacher = detdistill.wrap(make(mask_rcnn), classes=CLASSES)
    student = ours("fcos", strides=(8, 16, 32))
    student.preprocessor = teacher.preprocessor
    losses = Pair(student, teacher, ["ima"]).train()(*example())
    assert losses["ima"] > 0
    with pytest.raises(UserError, match="kd compares predictions"):
        Pair(student, teacher, ["kd"])
    with pytest.raises(ValueError, match="learns from masks"):
        teacher.train().preprocess([torch.rand(3, 64, 64)], [{"boxes": torch.zeros(0, 4)}])


@pytest.mark.parametrize(("build", "family"), [(retinanet, "retinanet"), (fcos_object, "fcos")])
def test_our_student_learns_from_an_objects_predictions(build, family):
    teacher = detdistill.wrap(make(build), classes=CLASSES)
    torch.manual_seed(1)
    student = ours(family)
    student.preprocessor = teacher.preprocessor
    losses = Pair(student, teacher, ["kd"]).train()(*example())
    assert torch.isfinite(losses["kd"])
    assert losses["kd"] > 0
