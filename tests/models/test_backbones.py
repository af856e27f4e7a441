from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.models.base import Detector
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.recipe import model_config

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenetv2_100",
        "mobilenetv3_small_050",
        pytest.param("resnet101", marks=SLOW),
        pytest.param("resnext101_64x4d", marks=SLOW),
        "convnext_atto",  # no stride 2, and timm writes its module names differently
        "efficientnet_lite0",
    ],
)
def test_backbones_give_the_strides_asked_for(name: str) -> None:
    backbone = Backbone(name, (8, 16, 32)).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert list(maps) == [8, 16, 32]
    for stride, x in maps.items():
        assert x.shape == (1, backbone.channels[stride], 64 // stride, 96 // stride)
    pyramid = FeaturePyramid(backbone.channels, 16, (8, 16, 32, 64, 128))(maps)
    assert {stride: tuple(x.shape[2:]) for stride, x in pyramid.items()} == {
        8: (8, 12), 16: (4, 6), 32: (2, 3), 64: (1, 2), 128: (1, 1),
    }  # fmt: skip


def test_maps_in_channels_last_order_are_turned() -> None:
    backbone = Backbone("swin_tiny_patch4_window7_224", (8, 16)).eval()
    maps = backbone(torch.rand(1, 3, 224, 224))
    assert {stride: tuple(x.shape) for stride, x in maps.items()} == {8: (1, 192, 28, 28), 16: (1, 384, 14, 14)}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_a_backbone_of_one_input_size_says_so(name: str) -> None:
    backbone = Backbone(name, (16,))
    with pytest.raises(UserError, match=rf"{name}' cannot take an input of 64×96 .*keep_ratio: false"):
        backbone(torch.rand(1, 3, 64, 96))


def test_the_pyramid_takes_odd_sizes() -> None:
    backbone = Backbone("resnet18", (4, 8, 16, 32)).eval()
    pyramid = FeaturePyramid(backbone.channels, 8, (4, 8, 16, 32, 64), extra="pool")(
        backbone(torch.rand(1, 3, 75, 101))
    )
    assert tuple(pyramid[64].shape[2:]) == (2, 2)


def test_unknown_names_and_strides_are_told_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"did you mean .*resnet50"):
        build_model("retinanet", 2, backbone="resnet5O")
    with pytest.raises(UserError, match=r"offers strides \[4, 8, 16, 32\], not \[2\]"):
        Backbone("convnext_atto", (2, 4))
    with pytest.raises(UserError, match="ends at stride 32"):
        split_strides("resnet18", (64, 128))


def test_a_failed_download_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no route to host")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match=r"ImageNet weights of 'resnet18' are not in the local cache and cannot be downloaded"
    ) as caught:
        build_model(model_config(backbone="resnet18", backbone_weights="imagenet"), ["cat"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "stages", "frozen_end", "first_learning"),
    [
        ("resnet18", 1, "bn1.weight", "layer1.0.conv1.weight"),
        ("resnet18", 2, "layer1.1.bn2.weight", "layer2.0.conv1.weight"),
        ("mobilenetv2_100", 1, "blocks.0.0.bn2.weight", "blocks.1.0.conv_pw.weight"),
        ("convnext_atto", 1, "stages_0.blocks.1.mlp.fc2.weight", "stages_1.downsample.0.weight"),
    ],
)
def test_frozen_stages_end_where_they_should(
    name: str, stages: int, frozen_end: str, first_learning: str
) -> None:
    learns = {
        n: p.requires_grad for n, p in Backbone(name, (8, 16, 32), freeze_stages=stages).body.named_parameters()
    }
    assert not learns[frozen_end]
    assert learns[first_learning]
    names = list(learns)
    assert not any(learns[n] for n in names[: names.index(first_learning)])
    assert all(learns[n] for n in names[names.index(first_learning) :])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("converted", [False, True])
def test_frozen_parts_stay_as_they_are_in_training(name: str, converted: bool) -> None:
    backbone: nn.Module = Backbone(name, (8, 16, 32), freeze_stages=2)
    if converted:  # other modules take the place of the BatchNorms
        backbone = timm.layers.convert_sync_batchnorm(backbone)
    backbone.train()
    if not converted:
        before = {n: b.clone() for n, b in backbone.named_buffers()}
        sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
        moved = {n for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
        assert moved
        assert not any(
            n.startswith(("body.bn1", "body.layer1", "body.blocks.0", "body.blocks.1")) for n in moved
        )
        assert all((p.grad is None) != p.requires_grad for p in backbone.parameters())
    frozen = [m for n, m in backbone.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][:2]
    assert not any(module.training for module in frozen)
    assert any(module.training for module in backbone.modules())


def test_every_learning_parameter_gets_a_gradient_even_with_few_levels() -> None:
    """timm builds EfficientNets whole; blocks beyond the last tap must not make DDP wait for them."""
    backbone = Backbone("mobilenetv2_100", (4, 8))
    sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all((p.grad is None) != p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_frozen_norm_keeps_function_and_names(name: str) -> None:
    plain, frozen = Backbone(name, (8, 16)).eval(), Backbone(name, (8, 16), norm="frozen")
    for module_name, buffer in plain.named_buffers():
        if module_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    state = {n: t for n, t in plain.state_dict().items() if not n.endswith("num_batches_tracked")}
    frozen.load_state_dict(state)
    image = torch.rand(1, 3, 64, 64)
    for a, b in zip(plain(image).values(), frozen.train()(image).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestBackboneWeights:
    def built(self, name: str, path: Path) -> Detector:
        config = model_config(backbone=name, backbone_weights=str(path), channels=16, strides=(8, 16, 32))
        return build_model(config, ["cat"])

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
    def test_a_classification_file_of_timm_loads(self, name: str, tmp_path: Path) -> None:
        classifier = timm.create_model(name, num_classes=5).eval()
        torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
        model = self.built(name, tmp_path / "classifier.pth").eval()
        image = torch.rand(1, 3, 64, 64)
        got = model.backbone(image)[16]  # type: ignore[operator]
        expected = classifier.forward_intermediates(image, intermediates_only=True)
        assert any(x.shape == got.shape and torch.allclose(x, got, atol=1e-4) for x in expected)

    def test_torchvisions_resnet_is_of_the_same_layout(self, tmp_path: Path) -> None:
        import torchvision

        resnet = torchvision.models.resnet18(weights=None)
        save_file(resnet.state_dict(), tmp_path / "resnet18.safetensors")
        model = self.built("resnet18", tmp_path / "resnet18.safetensors")
        assert torch.equal(
            model.state_dict()["backbone.body.layer4.1.conv2.weight"], resnet.layer4[1].conv2.weight
        )

    @pytest.mark.parametrize("other", ["resnet34", "resnet50", "mobilenetv2_100"])
    def test_another_backbones_file_is_refused(self, other: str, tmp_path: Path) -> None:
        torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"other\.pth: .*fit"):
            self.built("resnet18", tmp_path / "other.pth")

    def test_input_normalization_follows_the_backbone(self, tmp_path: Path) -> None:
        name = "mobilenetv3_large_100.miil_in21k_ft_in1k"  # trained without mean and std
        torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
        assert self.built(name, tmp_path / "weights.pth").preprocessor.std == (1.0, 1.0, 1.0)


def test_extra_levels_may_come_from_the_backbones_last_map() -> None:
    torch.manual_seed(0)
    maps = {16: torch.rand(1, 6, 8, 8), 32: torch.rand(1, 12, 4, 4)}
    pyramid = FeaturePyramid({16: 6, 32: 12}, 8, (16, 32, 64, 128), extra="linear", extra_from="backbone")
    got = pyramid(maps)
    p6 = pyramid.extra[0](maps[32])
    assert torch.equal(got[64], p6)
    assert torch.equal(got[128], pyramid.extra[1](p6))  # without a ReLU
    assert (p6 < 0).any()


def test_a_pyramid_may_be_normalized_in_groups() -> None:
    pyramid = FeaturePyramid({16: 6, 32: 12}, 32, (16, 32, 64), extra="linear", group_norm=True)
    convolutions = [m for m in pyramid.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in pyramid.modules() if isinstance(m, nn.GroupNorm)]
    assert len(convolutions) == len(norms) == 5
    assert all(conv.bias is None for conv in convolutions)
    assert {norm.num_groups for norm in norms} == {4}
    for x in pyramid({16: torch.rand(2, 6, 8, 8), 32: torch.rand(2, 12, 4, 4)}).values():
        groups = x.unflatten(1, (4, 8)).flatten(2)
        torch.testing.assert_close(groups.mean(dim=2), torch.zeros(2, 4), rtol=0, atol=1e-5)
