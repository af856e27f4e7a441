"""Counts that can be done by hand."""

from __future__ import annotations

import pytest
import torch

from detdistill.evaluation.efficiency import efficiency
from detdistill.models.base import DenseOutputs, Detector, Preprocess


class OneConvolution(Detector):
    classes = ("thing",)
    preprocessor = Preprocess(size=(64, 64))
    pyramid_channels = {32: 8}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 5, stride=32, padding=2)

    def forward_features(self, batch):
        assert not self.training
        return {32: self.conv(batch.images_N3HW)}

    def forward_head(self, pyramid, batch):
        return DenseOutputs(cls=pyramid, box=pyramid)

    def losses(self, outputs, batch):
        return {}

    def decode(self, outputs, batch):
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]


def test_counts():
    model = OneConvolution().train()
    costs = efficiency({"one": model, "same": model}, size=(100, 100), runs=3, batch_size=2)
    assert list(costs) == ["one", "same"]
    cost = costs["one"]  # resized to 64 × 64: outputs of 2 × 2
    assert cost.parameters == 8 * 3 * 25 + 8
    assert cost.macs == 2 * 2 * 8 * 3 * 25
    assert cost.flops == 2 * cost.macs
    assert cost.checkpoint_bytes == 4 * cost.parameters
    assert cost.images_per_second > 0
    assert 0 < cost.latency[50] <= cost.latency[90] <= cost.latency[99]
    assert cost.peak_memory_bytes is None or cost.peak_memory_bytes >= cost.checkpoint_bytes
    assert model.training


def test_macs_of_a_known_network():
    """torchvision states 4.09 GMAC for ResNet-50 at 224 × 224, of which 2 M are the classifier's."""
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    model = OneConvolution()
    model.preprocessor = Preprocess()
    model.conv = create_feature_extractor(resnet50(), {"layer4": "map"})
    model.forward_features = lambda batch: {32: model.conv(batch.images_N3HW)["map"]}
    costs = efficiency({"resnet50": model}, size=(224, 224), runs=1, warmup=0)
    assert costs["resnet50"].macs / 1e9 == pytest.approx(4.09, abs=0.01)


def test_memory_of_a_big_map_is_seen():
    """One map of 64 MiB: what is told is at least that, and not many times as much."""
    model = OneConvolution()
    model.preprocessor = Preprocess()
    model.conv = torch.nn.Conv2d(3, 16, 1, bias=False)
    model.forward_features = lambda batch: {1: model.conv(batch.images_N3HW)}
    peak = efficiency({"model": model}, size=(1024, 1024), runs=1, warmup=0)["model"].peak_memory_bytes
    if peak is not None:  # not Linux
        assert 64 * 2**20 <= peak < 400 * 2**20
