"""The oracles of Instance Mask Alignment: identities that hold whatever was trained."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import fft as scipy_fft
from torch.nn import functional as F

from detdistill.distillation.methods.ima import IMALoss
from detdistill.distillation.spectrum import dct_basis, hermitian
from detdistill.recipe.methods import IMAOptions, ImportanceOptions, MaskOptions
from detdistill.recipe.reading import merge

# The rows of the paper's Table 5.
LADDER = {
    "plain imitation": {
        # raw maps bring their own scale
        "alpha": 1.0,
        "mask": {"domain": "none"},
        "standardize": {"student": False, "teacher": False},
        "importance": {"kind": "none"},
    },
    "+ mask": {
        "alpha": 1.0,
        "standardize": {"student": False, "teacher": False},
        "importance": {"kind": "none"},
        "mask": {"keep_dc": True},
    },
    "+ standardization": {"alpha": 100.0, "importance": {"kind": "none"}},
    "+ scale deflation": {"alpha": 100.0},
}
PLAIN = LADDER["plain imitation"]
PRESETS = IMAOptions.presets


def maps(n=3, c=5, h=12, w=10, seed=0, scale=2.0, shift=0.7):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, c, h, w, generator=generator) * scale + shift
    teacher = torch.randn(n, c, h, w, generator=generator) + 0.5 * student
    return student.requires_grad_(), teacher


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(loss, student):
    return torch.autograd.grad(loss, student)[0]


# 1
@pytest.mark.parametrize("domain", ["none", "fft"])
def test_without_mask_and_alignment_it_is_plain_mse(domain):
    student, teacher = maps()
    loss = IMALoss(**{**PLAIN, "mask": {"domain": domain, "ratio": 0.0}, "alpha": 3.0})(student, teacher)
    expected = 3 * np.mean((student.detach().double().numpy() - teacher.double().numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


# 2
def test_standardized_without_mask_it_is_twice_pkd():
    student, teacher = maps(n=1)

    def standardized(x):  # PKD: per channel over N·H·W, unbiased
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6)

    pkd = F.mse_loss(standardized(student), standardized(teacher)) / 2
    loss = IMALoss(mask={"ratio": 0}, importance={"kind": "none"}, alpha=1)(student, teacher)
    n = student.shape[-1] * student.shape[-2]
    assert loss.item() == pytest.approx(2 * pkd.item() * n / (n - 1), rel=1e-4)
    batch = maps()
    by_batch = IMALoss(mask={"ratio": 0}, importance={"kind": "none"}, alpha=1, standardize={"stats": "batch"})(
        *batch
    )
    assert by_batch.item() == pytest.approx(2 * F.mse_loss(*map(standardized, batch)).item() / 2, rel=1e-2)


# 3
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (8, 5), (5, 8), (1, 6), (6, 1), (2, 2)])
def test_symmetric_mask_gives_a_real_map(height, width):
    random = hermitian(torch.rand(4, 1, height, width, generator=seeded()))
    keep = random >= 0.5
    x = torch.randn(4, 3, height, width, dtype=torch.float64)
    filtered = torch.fft.ifft2(torch.fft.fft2(x) * keep)
    assert filtered.imag.abs().max() < 1e-6
    loss = IMALoss()
    ours = loss._filter(x.float(), keep)
    torch.testing.assert_close(ours, filtered.real.float(), atol=1e-5, rtol=1e-5)


def test_symmetric_mask_keeps_the_ratio():
    removed = (hermitian(torch.rand(400, 1, 9, 8, generator=seeded())) < 0.3).float()
    per_bin = removed.mean((0, 1))
    sigma = math.sqrt(0.3 * 0.7 / 400)
    assert (per_bin - 0.3).abs().max() < 4.5 * sigma


# 4
def test_expected_masked_mse():
    student, teacher = maps(n=1, c=2, h=8, w=8)
    zeta, draws = 0.4, 4000
    options = {**LADDER["+ mask"], "mask": {"ratio": zeta}}
    loss, generator = IMALoss(**options), seeded()
    with torch.no_grad():
        values = torch.stack([loss(student, teacher, generator=generator) for _ in range(draws)])
    expected = (1 - zeta) * F.mse_loss(student, teacher) + zeta * teacher.square().mean()
    assert abs(values.mean() - expected) < 3 * values.std() / math.sqrt(draws)


# 5
def test_real_part_of_asymmetric_mask_is_the_symmetrized_filter():
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    keep = torch.rand(2, 1, 8, 7, generator=seeded()) >= 0.5
    mirrored = keep.flip(-2, -1).roll((1, 1), (-2, -1))
    symmetrized = (keep.double() + mirrored.double()) / 2
    expected = torch.fft.ifft2(torch.fft.fft2(x) * symmetrized)
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(IMALoss(mask={"hermitian": False})._filter(x, keep), expected.real)


# 6
def test_blind_to_scale_and_shift_of_the_student():
    student, teacher = maps()
    scale = torch.tensor([0.5, 2.0, 7.0, 1.0, 3.0])[None, :, None, None]
    loss = IMALoss(standardize={"eps": 1e-12})
    a = loss(student, teacher, generator=seeded())
    b = loss(student * scale + scale, teacher, generator=seeded())
    assert a.item() == pytest.approx(b.item(), rel=1e-4)
    # so the gradient is orthogonal to each channel of the student
    inner = (gradient(a, student) * student).sum((2, 3))
    assert inner.abs().max() < 1e-4


# 7
def test_detached_importance_only_weights_the_gradient():
    student, teacher = maps()
    options = {"importance": {"source": "raw", "gamma_min": None}}
    weighted = gradient(IMALoss(**options)(student, teacher, generator=seeded()), student)
    plain = gradient(IMALoss(importance={"kind": "none"})(student, teacher, generator=seeded()), student)
    s, t = student.detach().flatten(1), teacher.flatten(1)
    gamma = F.cosine_similarity(s, t)
    # d/ds (γŝ - t)² = 2γ(γŝ - t): orthogonal to s apart from the t term, whose weight is γ
    torch.testing.assert_close(weighted, gamma[:, None, None, None] * plain, atol=1e-6, rtol=2e-4)


# 8
@pytest.mark.parametrize(
    "options", [{}, {"importance": {"target": "both"}}, {"importance": {"kind": "none"}}, PLAIN]
)
def test_nothing_to_learn_from_oneself(options):
    student, _ = maps()
    loss = IMALoss(**{**options, "mask": {"ratio": 0}})(student, student.detach().clone())
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert gradient(loss, student).abs().max() < 1e-5


# 9
DEGENERATE = {
    "constant": torch.full((2, 3, 6, 6), 3.0),
    "zero": torch.zeros(2, 3, 6, 6),
    "one pixel": torch.ones(2, 3, 1, 1),
    "row": torch.randn(2, 3, 1, 9),
    "huge": torch.full((2, 3, 6, 6), 1e4),
}


@pytest.mark.filterwarnings("ignore:this IMA")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DEGENERATE)
def test_finite_on_degenerate_maps(name, dtype, preset):
    student = DEGENERATE[name].to(dtype).requires_grad_()
    labels = torch.randint(0, 3, student[:, 0].shape)
    labels[:, 0] = 255
    for teacher in (torch.randn_like(student), torch.zeros_like(student)):
        for options in ({}, {"mask": {"domain": "dct"}}, {"mask": {"domain": "spatial"}}, {"distance": "l1"}):
            loss = IMALoss(**merge(PRESETS[preset], options))(student, teacher, labels_NHW=labels)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient(loss, student)).all()


# 10
def test_a_seed_decides_the_mask():
    student, teacher = maps()
    a, b, c = (IMALoss()(student, teacher, generator=seeded(seed)).item() for seed in (1, 1, 2))
    assert a == b
    assert a != c
    torch.manual_seed(3)
    before = torch.get_rng_state()
    IMALoss()(student, teacher, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


# 12 (11, the exported student, is in test_pair.py)
def test_teacher_gets_no_gradient():
    student, teacher = maps()
    teacher.requires_grad_()
    IMALoss()(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


# --- the closed form, importance and the other options --------------------------------------------------


def test_closed_form():
    """Both sides standardized: L = 1 + γ² - 2γr, with r the mean correlation over channels."""
    student, teacher = maps()
    x, y = student.detach().double().flatten(2).numpy(), teacher.double().flatten(2).numpy()
    r = np.array([[np.corrcoef(x[n, c], y[n, c])[0, 1] for c in range(5)] for n in range(3)]).mean(1)
    gamma = np.clip(r, 0.1, 1)
    loss = IMALoss(mask={"ratio": 0}, alpha=1, standardize={"eps": 1e-12})(student, teacher)
    assert loss.item() == pytest.approx(np.mean(1 + gamma**2 - 2 * gamma * r), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"importance": {"kind": "none"}}, {"importance": {"kind": "shifted"}},
     {"importance": {"target": "both"}}, {"mask": {"teacher": True}},
     {"importance": {"detach": False, "gamma_min": None}}, {"standardize": {"eps": 0.5}}],
)  # fmt: skip
def test_fewer_passes_give_the_same_loss_and_gradient(options, monkeypatch):
    student, teacher = maps(shift=20.0)  # a large mean is where cancellation would show
    quick = IMALoss(alpha=1, **options)(student, teacher, generator=seeded())
    monkeypatch.setattr(IMALoss, "_is_correlation", lambda self: False)
    plain = IMALoss(alpha=1, **options)(student, teacher, generator=seeded())
    assert quick.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(gradient(quick, student), gradient(plain, student), rtol=1e-4, atol=1e-7)


def test_importance_sources_and_clamp():
    student, teacher = maps()
    opposite = IMALoss(mask={"ratio": 0}, alpha=1, standardize={"eps": 1e-12})(student, -student.detach())
    assert opposite.item() == pytest.approx((0.1 + 1) ** 2, rel=1e-4)
    free = IMALoss(mask={"ratio": 0}, alpha=1, standardize={"eps": 1e-12}, importance={"gamma_min": None})(
        student, -student.detach()
    )
    assert free.item() == pytest.approx(0, abs=1e-6)  # γ = -1 calls the opposite map perfect
    shifted = IMALoss(
        mask={"ratio": 0},
        alpha=1,
        standardize={"eps": 1e-12},
        importance={"kind": "shifted", "gamma_min": None},
    )
    assert shifted(student, -student.detach()).item() == pytest.approx(1, rel=1e-4)
    outputs = IMALoss(mask={"ratio": 0}, importance={"source": "raw"})(student, teacher)
    masked = IMALoss(mask={"ratio": 0}, importance={"source": "masked"})(student, teacher)
    assert outputs.item() == pytest.approx(masked.item())
    assert outputs.item() != pytest.approx(IMALoss(mask={"ratio": 0})(student, teacher).item(), rel=1e-3)


def test_scaling_both_sides_has_no_floor():
    """Scaling both sides weights an instance by γ²."""
    student, teacher = maps()
    both = IMALoss(
        mask={"ratio": 0}, importance={"target": "both", "gamma_min": None, "source": "raw"}, alpha=1
    )
    gamma = F.cosine_similarity(student.detach().flatten(1), teacher.flatten(1))
    each = IMALoss(mask={"ratio": 0}, importance={"kind": "none"}, alpha=1)
    expected = sum(gamma[n] ** 2 * each(student[n : n + 1], teacher[n : n + 1]) for n in range(3)) / 3
    assert both(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dct_is_scipys():
    x = np.random.default_rng(0).normal(size=(7, 10))
    rows, columns = dct_basis(7, torch.device("cpu")), dct_basis(10, torch.device("cpu"))
    ours = rows.double() @ torch.from_numpy(x) @ columns.double().T
    np.testing.assert_allclose(ours, scipy_fft.dctn(x, norm="ortho"), atol=1e-5)


@pytest.mark.parametrize("domain", ["fft", "dct", "spatial"])
def test_filter_keeps_all_or_nothing(domain):
    x = torch.randn(2, 3, 6, 7)
    loss = IMALoss(mask={"domain": domain})
    torch.testing.assert_close(
        loss._filter(x, torch.ones(2, 1, 6, 7, dtype=torch.bool)), x, atol=1e-5, rtol=1e-5
    )
    assert loss._filter(x, torch.zeros(2, 1, 6, 7, dtype=torch.bool)).abs().max() == 0


def test_padding_does_not_count_where_it_is_declared():
    student, teacher = maps(n=2, h=9, w=8)
    valid = torch.zeros(2, 14, 11, dtype=torch.bool)
    valid[:, :9, :8] = True
    padded = [F.pad(x, (0, 3, 0, 5), value=9.0) for x in (student, teacher)]
    loss = IMALoss(mask={"ratio": 0})
    assert loss(*padded, valid_NHW=valid).item() == pytest.approx(loss(student, teacher).item(), rel=1e-4)


def test_batch_composition_does_not_matter():
    student, teacher = maps(n=4)
    loss = IMALoss(mask={"ratio": 0})
    alone = torch.stack([loss(student[n : n + 1], teacher[n : n + 1]) for n in range(4)]).mean()
    assert loss(student, teacher).item() == pytest.approx(alone.item(), rel=1e-5)


def test_box_instances():
    student, teacher = maps(n=2, h=16, w=16)
    boxes = [torch.tensor([[1.0, 1.0, 9.0, 9.0], [4.0, 2.0, 12.0, 15.0]]), torch.zeros(0, 4)]
    loss = IMALoss(instance="box", mask={"ratio": 0})
    value = loss(student, teacher, boxes=boxes)
    grads = gradient(value, student)
    assert grads[0].abs().sum() > 0
    assert grads[1].abs().sum() == 0  # an image without boxes
    nothing = loss(student, teacher, boxes=[torch.zeros(0, 4)] * 2)
    assert nothing.item() == 0
    assert gradient(nothing, student).abs().sum() == 0
    with pytest.raises(ValueError, match="needs boxes"):
        loss(student, teacher)


def test_class_regions():
    """γ is each region's own cosine; ignored pixels and small regions do not count."""
    student, teacher = maps(n=1, c=4, h=8, w=8)
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4:] = 2
    labels[:, 0] = 255
    labels[:, 7, :3] = 1  # 3 pixels: too few
    options = {
        "instance": "class_region",
        "mask": {"ratio": 0},
        "standardize": {"student": False, "teacher": False},
        "importance": {"source": "raw", "gamma_min": None},
        "alpha": 1,
    }
    loss = IMALoss(**options)(student, teacher, labels_NHW=labels)
    s, t = (x.detach().double().numpy()[0] for x in (student, teacher))
    total = count = 0.0
    for label in (0, 2):
        at = labels[0].numpy() == label
        x, y = s[:, at], t[:, at]
        gamma = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        total += ((gamma * x - y) ** 2).sum()
        count += x.size
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_region_statistics_delete_the_class_mean():
    student, teacher = maps(n=1, c=4, h=8, w=8)
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4:] = 1
    offset = labels[:, None] * 5.0
    loss = IMALoss(instance="class_region", region_stats=True, mask={"ratio": 0}, standardize={"eps": 1e-12})
    a = loss(student, teacher, labels_NHW=labels)
    b = loss(student + offset, teacher, labels_NHW=labels)
    assert a.item() == pytest.approx(b.item(), rel=1e-4)


def test_autocast_is_an_island():
    student, teacher = maps()
    outside = IMALoss()(student, teacher, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        inside = IMALoss()(student, teacher, generator=seeded())
    assert inside.item() == outside.item()


def test_ladder_adds_a_step_at_a_time():
    student, teacher = maps()
    values = [IMALoss(**options)(student, teacher, generator=seeded()).item() for options in LADDER.values()]
    assert len(set(values)) == 4
    assert values[0] == pytest.approx(F.mse_loss(student, teacher).item(), rel=1e-5)


def test_literal_warns_and_can_be_lowered_by_growing_dissimilar():
    with pytest.warns(UserWarning, match="less similar"):
        literal = IMALoss(**PRESETS["literal"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IMALoss()
    torch.manual_seed(0)
    teacher = 0.2 * torch.randn(4, 8, 10, 10)
    start = F.cosine_similarity
    for loss, grows in ((literal, False), (IMALoss(mask={"ratio": 0.5}), True)):
        student = (teacher / 0.2 + torch.randn_like(teacher)).requires_grad_()
        before = start(student.flatten(1), teacher.flatten(1)).mean().item()
        optimizer = torch.optim.SGD([student], lr=20.0)
        for _ in range(200):
            optimizer.zero_grad()
            loss(student, teacher, generator=None).backward()
            optimizer.step()
        after = start(student.detach().flatten(1), teacher.flatten(1)).mean().item()
        assert (after > before) == grows


def test_unequal_shapes_and_ratio_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        IMALoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="less than 1"):
        IMALoss(mask={"ratio": 1.0})
    with pytest.raises(ValueError, match="did you mean 'ratio'"):
        IMALoss(mask={"ration": 0.5})


def test_a_group_is_a_class_or_a_mapping():
    loss = IMALoss(mask=MaskOptions(ratio=0.2), importance={"kind": "none"})
    assert loss.mask == MaskOptions(ratio=0.2)
    assert loss.importance == ImportanceOptions(kind="none")
