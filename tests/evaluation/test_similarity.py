"""Linear CKA against its definition by kernels, its invariances, and what is compared of two detectors."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from detdistill.distillation.pair import Pair
from detdistill.evaluation.similarity import LinearCKA, feature_agreement, linear_cka
from detdistill.models import build_model
from detdistill.recipe import model_config


def features(cells=200, channels=(5, 7), seed=0, offset=0.0):
    """Two sets that have three directions in common."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(cells, 3))
    return [common @ rng.normal(size=(3, c)) + rng.normal(size=(cells, c)) + offset for c in channels]


def cka_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of linear kernels, P × P: the paper's Eq. 1 and 4."""
    centring = np.eye(len(x)) - np.ones((len(x), len(x))) / len(x)

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring) / (len(x) - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("parts", [(200,), (1, 199), (64, 64, 72)])
def test_equals_the_definition_however_it_is_cut(offset, parts) -> None:
    x, y = features(offset=offset)
    cka = LinearCKA()
    for x_part, y_part in zip(torch.from_numpy(x).split(parts), torch.from_numpy(y).split(parts), strict=True):
        cka.update(x_part, y_part)
    centered = cka_by_kernels(x - x.mean(0), y - y.mean(0))
    assert cka.value() == pytest.approx(centered, rel=1e-9)
    assert 0.1 < centered < 0.9


def test_identical_rotated_and_scaled_features_agree_wholly() -> None:
    x, y = (torch.from_numpy(z) for z in features())
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 1e-3 * (x @ rotation) + 4) == pytest.approx(1)
    assert linear_cka(x @ rotation, y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))
    stretched = x * torch.tensor([100.0, 1, 1, 1, 1], dtype=torch.float64)
    assert linear_cka(x, stretched) < 0.9  # no invariance to any linear map, by design


def test_unrelated_features_hardly_agree_and_constant_ones_cannot_be_told() -> None:
    x, y = torch.randn(20_000, 8), torch.randn(20_000, 16)
    assert linear_cka(x, y) < 3 * math.sqrt(8 * 16) / 20_000
    assert math.isnan(linear_cka(x, torch.ones(20_000, 2)))
    assert math.isnan(LinearCKA().value())


# --- two detectors ---------------------------------------------------------------------------------------


def detector(channels=8, seed=0, **options):
    torch.manual_seed(seed)
    section = {"backbone": "mobilenetv3_small_050", "head_depth": 1, "strides": (8, 16), **options}
    return build_model(model_config(family="fcos", channels=channels, **section), ("a",)).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return [torch.rand(3, height, width) for height, width in ((64, 64), (48, 64), (64, 40))]


def agreement(student, teacher, batches):
    matching = Pair(student, teacher).matching
    return feature_agreement(student, teacher, matching, batches)


def expected(student, teacher, images, strides):
    """All cells of all images at once, by the definition; the student's map is resized to the teacher's."""
    found = {}
    for s_stride, t_stride in strides:
        rows = []
        for image in images:
            batches = [model.preprocess([image]) for model in (student, teacher)]
            s, t = (
                model.forward_features(batch)[stride].detach()
                for model, batch, stride in zip((student, teacher), batches, (s_stride, t_stride), strict=True)
            )
            if s.shape[2:] != t.shape[2:]:
                s = F.interpolate(s, t.shape[2:], mode="bilinear", align_corners=False)
            height, width = (math.ceil(side / t_stride) for side in batches[1].sizes[0])
            rows.append([m[0, :, :height, :width].flatten(1).T.double().numpy() for m in (s, t)])
        found[s_stride] = cka_by_kernels(*(np.concatenate(part) for part in zip(*rows, strict=True)))
    return found


def test_levels_of_a_pair_over_the_images_without_their_padding(images) -> None:
    student, teacher = detector(), detector(channels=12, seed=1)
    # One image at a time, so that the oracle's batches have the same borders.
    found = agreement(student, teacher, ([image] for image in images))
    assert found == pytest.approx(expected(student, teacher, images, [(8, 8), (16, 16)]), rel=1e-5)
    same = agreement(student, copy.deepcopy(student), [images])
    assert same == pytest.approx({8: 1.0, 16: 1.0})


@pytest.mark.parametrize("sizes", [(None, None), (64, 128)])
def test_unequal_strides_and_inputs_are_resized_to_the_teachers(sizes, images) -> None:
    student, teacher = detector(strides=(8,), size=sizes[0]), detector(seed=1, strides=(32,), size=sizes[1])
    found = agreement(student, teacher, [[images[0]]])  # a square, of which both inputs see the same share
    assert found == pytest.approx(expected(student, teacher, images[:1], [(8, 32)]), rel=1e-4)


def test_modes_are_left_as_they_are_and_nothing_is_learnt(images) -> None:
    student, teacher = detector(), detector(seed=1)
    in_eval = agreement(student, teacher, [images])
    in_train = agreement(student.train(), teacher, [images])
    assert in_train != in_eval
    assert student.training
    assert not teacher.training
    assert all(parameter.grad is None for parameter in student.parameters())
