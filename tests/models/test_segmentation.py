"""PSPNet and DeepLabV3: their parts, their losses, their label maps, and the windows of large images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from detdistill.errors import UserError
from detdistill.models import EncoderDecoder, Preprocess, build_model, load_model, save_model
from detdistill.models.base import Batch, SegmentationOutputs
from detdistill.models.families.segmentation import DILATIONS, AtrousPooling, Pooled, PyramidPooling
from detdistill.models.layers.backbones import Backbone
from detdistill.models.preprocess import resize_labels
from detdistill.recipe import model_config

FAMILIES = ["pspnet", "deeplabv3"]


def small(family: str = "pspnet", **options: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    model: Any = build_model(family, 5, **{"backbone": "mobilenetv3_small_050", "channels": 16, **options})
    nn.init.normal_(model.head.cls.weight, std=0.5)  # classes that differ from pixel to pixel
    return model


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def target(height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    labels_HW = torch.randint(0, 5, (height, width), generator=torch.Generator().manual_seed(seed))
    return {"semantic": labels_HW.to(torch.uint8)}


def count(model: nn.Module, *, norms: bool) -> int:
    """Parameters without the auxiliary head, which a user of the model does not need."""
    return sum(
        parameter.numel()
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if not name.startswith("head.aux") and (norms or not isinstance(module, nn.BatchNorm2d))
    )


def test_the_papers_pair_has_the_papers_numbers_of_parameters() -> None:
    """Table 7: 12.61M and 84.74M; the student's is met without normalization layers (with them 12.62M)."""
    with torch.device("meta"):
        student, teacher = (
            build_model("pspnet", 19, backbone="resnet18", channels=128),
            build_model("deeplabv3", 19, backbone="resnet101c", channels=512),
        )
    assert round(count(student, norms=False) / 1e6, 2) == 12.61
    assert round(count(student, norms=True) / 1e6, 2) == 12.62
    assert round(count(teacher, norms=True) / 1e6, 2) == 84.74


def test_atrous_pooling_has_torchvisions_branches() -> None:
    torch.manual_seed(0)
    ours, theirs = AtrousPooling(6, 4).eval(), ASPP(6, DILATIONS, 4).eval()
    theirs_in_our_order = [theirs.convs[4], *theirs.convs[:4]]
    for own, other in zip(ours.branches, theirs_in_our_order, strict=True):
        values = list(other.state_dict().values())
        own.load_state_dict(dict(zip(own.state_dict(), values, strict=True)))
    x = torch.randn(2, 6, 11, 9)
    for own, other in zip(ours.branches, theirs_in_our_order, strict=True):
        torch.testing.assert_close(own(x), other(x))


def test_pyramid_pooling_takes_the_means_of_a_grid() -> None:
    pooled = Pooled(1, 1, 2).eval()
    with torch.no_grad():
        pooled[1][0].weight.fill_(1)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    found = pooled(x)[0, 0]
    means = x.numpy()[0, 0].reshape(2, 2, 2, 2).mean(axis=(1, 3))
    corners = found[[0, 0, -1, -1], [0, -1, 0, -1]]  # which a bilinear enlargement leaves as they are
    scale = 1 / np.sqrt(1 + pooled[1][1].eps)  # of an untrained BatchNorm
    np.testing.assert_allclose(corners.detach().numpy(), means.ravel() * scale, rtol=1e-5)
    assert PyramidPooling(3, 2).eval()(torch.randn(1, 3, 1, 1)).shape == (1, 2, 1, 1)


def test_a_dilated_backbone_has_the_weights_of_a_plain_one_and_ends_at_the_output_stride() -> None:
    plain, dilated = Backbone("resnet18", (16, 32)), Backbone("resnet18", (16, 32), output_stride=8)
    dilated.load_state_dict(plain.state_dict())
    maps = dilated(torch.zeros(1, 3, 64, 96))
    assert {stride: tuple(x.shape) for stride, x in maps.items()} == {16: (1, 256, 8, 12), 32: (1, 512, 8, 12)}
    with pytest.raises(UserError, match="cannot be dilated"):
        build_model("pspnet", 19, backbone="vit_tiny_patch16_224")


@pytest.mark.parametrize("build", FAMILIES)
def test_the_five_steps(build: Any) -> None:
    model = small(build).train()
    images, targets = [image(40, 52), image(64, 33, 1)], [target(40, 52), target(64, 33, 1)]
    losses = model(images, targets)
    assert list(losses) == ["cross_entropy", "cross_entropy_aux"]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    found = model.eval()(images)
    assert [tuple(one["semantic"].shape) for one in found] == [(40, 52), (64, 33)]
    assert all(one["semantic"].dtype == torch.int64 for one in found)
    batch = model.preprocess(images)
    assert {stride: x.shape[1] for stride, x in model.forward_features(batch).items()} == model.pyramid_channels
    assert model.forward_head(model.forward_features(batch), batch).aux_NQHW is None


@pytest.mark.slow
def test_it_learns_an_image_by_heart() -> None:
    model = small().train()
    labels_HW = torch.zeros(64, 64, dtype=torch.uint8)
    labels_HW[:, 32:] = 1
    labels_HW[:8] = 255
    picture = image(64, 64) / 2 + (labels_HW == 1) / 2
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(model([picture] * 2, [{"semantic": labels_HW}] * 2).values()).backward()
        optimizer.step()
    (found,) = model.eval()([picture])
    known = labels_HW != 255
    assert (found["semantic"] == labels_HW)[known].float().mean() > 0.9


def test_cross_entropy_against_scipy() -> None:
    model = small().train()
    labels_HW = np.array([[0, 3, 255, 4], [1, 255, 2, 2]])
    logits = torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    targets = [{"semantic": torch.from_numpy(labels_HW)}]
    batch = Batch(torch.zeros(1, 3, 2, 4), [(2, 4)], [(2, 4)], targets)
    losses = model.losses(SegmentationOutputs(logits, 2 * logits), batch)
    for name, factor, weight in (("cross_entropy", 1, 1), ("cross_entropy_aux", 2, 0.4)):
        log_p = log_softmax(factor * logits[0].double().numpy(), axis=0)
        terms = [-log_p[label, y, x] for (y, x), label in np.ndenumerate(labels_HW) if label != 255]
        assert losses[name].item() == pytest.approx(weight * np.mean(terms), rel=1e-6)


def test_logits_are_resized_as_scipy_does() -> None:
    """Half-pixel centers: a map of 2 columns on 4 has its values at 0.5 and 2.5."""
    model = small().eval()
    logits = torch.zeros(1, 5, 1, 2)
    logits[0, 1, 0] = torch.tensor([-1.0, 1.0])  # class 1 wins over the other classes' 0 right of the middle
    batch = Batch(torch.zeros(1, 3, 2, 4), [(2, 4)], [(2, 4)], None)
    (found,) = model.decode(SegmentationOutputs(logits), batch)
    assert found["semantic"].tolist() == [[0, 0, 1, 1]] * 2


def test_padding_and_ignored_pixels_do_not_count() -> None:
    model = small().train()
    images, targets = [image(40, 40), image(64, 64, 1)], [target(40, 40), target(64, 64, 1)]
    batch = model.preprocess(images, targets)
    labels_NHW = batch.semantic_labels()
    assert (labels_NHW[0, 40:] == 255).all()
    assert (labels_NHW[0, :, 40:] == 255).all()
    assert torch.equal(labels_NHW[0, :40, :40], targets[0]["semantic"].long())
    outputs = SegmentationOutputs(torch.randn(2, 5, 8, 8))
    whole = model.losses(outputs, batch)["cross_entropy"]
    # the same images as given with their padding: ignored there, they are the same loss
    padded = torch.full((64, 64), 255, dtype=torch.uint8)
    padded[:40, :40] = targets[0]["semantic"]
    ignored = Batch(batch.images_N3HW, [(64, 64)] * 2, [(64, 64)] * 2, [{"semantic": padded}, targets[1]])
    assert torch.equal(model.losses(outputs, ignored)["cross_entropy"], whole)


def test_finite_where_nothing_is_labeled_and_on_one_cell() -> None:
    model = small(norm="frozen").train()
    nothing = {"semantic": torch.full((9, 12), 255)}
    losses = model([image(9, 12)], [nothing])  # one image: means of one value, which have no variance
    assert [value.item() for value in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    losses = model([image(5, 7)], [target(5, 7)])
    assert all(value.isfinite() for value in losses.values())


def test_bf16_stays_close_to_fp32() -> None:
    model = small(norm="frozen").eval()
    model.training = True  # the auxiliary head is asked, and BatchNorm stays as it is
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model([image(64, 64)] * 2, [target(64, 64)] * 2)
        assert all(value.dtype == torch.float32 for value in losses.values())
        values.append(sum(losses.values()).item())
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_label_maps_go_with_resized_images() -> None:
    """Whichever half an image's pixel is in, its label is in: corners of the same place, at any size."""
    labels_HW = torch.zeros(60, 80, dtype=torch.uint8)
    labels_HW[:, 40:] = 3
    picture = (labels_HW / 3).expand(3, -1, -1)
    for size, scale_factor in (((30, 200), 1.0), ((90, 200), 1.0), ((60, 200), 0.7)):
        preprocess = Preprocess(size=size, mean=(0, 0, 0), std=(1, 1, 1), divisor=8)
        batch = preprocess([picture], [{"semantic": labels_HW}], scale_factor)
        resized = batch.targets[0]["semantic"]
        assert tuple(resized.shape) == batch.sizes[0]
        seen = batch.images_N3HW[0, 0, : batch.sizes[0][0], : batch.sizes[0][1]]
        certain = (seen < 0.01) | (seen > 0.99)
        assert torch.equal(resized[certain] == 3, seen[certain] > 0.5)
    assert torch.equal(resize_labels(labels_HW[None], (30, 40))[0], labels_HW[::2, ::2])


def test_answers_are_at_the_original_size_whatever_the_input() -> None:
    model = small(size=(48, 96)).eval()
    found = model([image(30, 50), image(200, 150, 1)])
    assert [tuple(one["semantic"].shape) for one in found] == [(30, 50), (200, 150)]


class Local(EncoderDecoder):
    """Whose logits are the pixels themselves: nothing is seen beyond a pixel, so windows change nothing."""

    def forward_features(self, batch: Batch) -> dict[int, Tensor]:
        return {8: batch.images_N3HW}

    def forward_head(self, pyramid: dict[int, Tensor], batch: Batch) -> SegmentationOutputs:
        return SegmentationOutputs(pyramid[8])


@pytest.mark.parametrize("window", [(32, 32), (32, 20), (40, 7), (200, 100)])
def test_windows_cover_every_pixel(window: tuple[int, int]) -> None:
    model = small(window=window).eval()
    model.__class__, model.classes = Local, ("r", "g", "b")
    images = [image(50, 70), image(64, 48, 1)]
    for found, own in zip(model(images), images, strict=True):
        mean, std = (torch.tensor(x)[:, None, None] for x in (model.preprocessor.mean, model.preprocessor.std))
        assert torch.equal(found["semantic"], ((own - mean) / std).argmax(dim=0))


def test_windows_average_what_overlaps() -> None:
    model = small(window=(32, 16)).eval()
    batch = model.preprocess([image(32, 48)])
    left, right = (
        Batch(batch.images_N3HW[..., at : at + 32].clone(), [(32, 32)], [(32, 32)], None) for at in (0, 16)
    )
    with torch.no_grad():
        parts = [model.forward_head(model.forward_features(part), part).logits_NQHW for part in (left, right)]
        enlarged = [nn.functional.interpolate(x, (32, 32), mode="bilinear") for x in parts]
        found = model._logits_by_window(batch, 32, 16)
    torch.testing.assert_close(found[..., :16], enlarged[0][..., :16])
    torch.testing.assert_close(found[..., 16:32], (enlarged[0][..., 16:] + enlarged[1][..., :16]) / 2)
    torch.testing.assert_close(found[..., 32:], enlarged[1][..., 16:])


def test_a_saved_segmenter_is_built_again_and_its_classes_chosen_by_name(tmp_path: Any) -> None:
    config = model_config(family="deeplabv3", backbone="mobilenetv3_small_050", channels=16, window=(64, 32))
    torch.manual_seed(0)
    model = build_model(config, ["road", "sky", "tree"])
    save_model(model, tmp_path / "student.safetensors")
    loaded = load_model(tmp_path)
    assert isinstance(loaded, EncoderDecoder)
    assert (loaded.classes, loaded.window) == (("road", "sky", "tree"), (64, 32))
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = build_model(model_config(weights=str(tmp_path)), ["tree", "car", "road"])
    assert isinstance(other, EncoderDecoder)
    for layer in ("cls", "aux_cls"):
        ours, theirs = (getattr(m.head, layer).weight for m in (other, model))
        assert torch.equal(ours[[0, 2]], theirs[[2, 0]])


def test_options_that_a_segmenter_has_not_are_refused() -> None:
    for options in ({"strides": (8, 16)}, {"score_threshold": 0.2}, {"head_depth": 2}):
        with pytest.raises(UserError, match=f"unknown key '{next(iter(options))}' of pspnet"):
            model_config(family="pspnet", **options)
    with pytest.raises(UserError, match="unknown key 'window' of fcos"):
        model_config(family="fcos", window=(64, 32))
    with pytest.raises(UserError, match="the stride no larger"):
        small(window=(32, 64))
    with pytest.raises(UserError, match="300 classes"):
        build_model("pspnet", 300, backbone="mobilenetv3_small_050")


def test_targets_of_the_other_task_are_refused() -> None:
    boxes = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="is for segmentation: give each target `semantic`"):
        small().train()([image(32, 32)], [boxes])
    with pytest.raises(ValueError, match="needs targets"):
        small().train()([image(32, 32)])
