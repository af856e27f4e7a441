"""What is special to the adversarial term: a discriminator that learns beside the student."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.adversarial import AdversarialLoss, Discriminator
from detdistill.distillation.pair import Pair
from detdistill.recipe import OptimizerConfig
from detdistill.training.step import build_optimizer

from .test_segmentation_pairs import batch, student, teacher


def test_the_discriminator_is_the_published_one():
    """Counted by hand: SAGAN's, for 19 classes, on the 65×65 logits of a crop of 512."""
    convolutions = 19 * 64 * 16 + 64 + 64 * 128 * 16 + 128 + 128 * 256 * 16 + 256 + 256 * 512 * 16 + 512
    attention = 2 * (256 * 32 + 32) + 256 * 256 + 256 + 1 + 2 * (512 * 64 + 64) + 512 * 512 + 512 + 1
    discriminator = Discriminator(19)
    found = sum(parameter.numel() for parameter in discriminator.parameters())
    assert found == 2 * 19 + convolutions + attention + 512 * 16 + 1
    assert discriminator(torch.randn(2, 19, 65, 65)).shape == (2, 1, 1, 1)
    assert discriminator(torch.randn(2, 19, 64, 128)).shape == (2, 1, 1, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 20)])
def test_small_maps_are_scored(size):
    torch.manual_seed(0)
    logits, other = torch.randn(2, 2, 3, *size)
    value = AdversarialLoss()(logits.requires_grad_(), other, torch.rand(2), Discriminator(3))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["wgan-gp", "hinge"])
def test_the_discriminator_learns_to_tell_them_apart_and_the_student_to_be_taken_for_the_teacher(kind):
    torch.manual_seed(0)
    theirs = torch.nn.functional.one_hot(torch.randint(0, 3, (4, 20, 20)), 3).permute(0, 3, 1, 2) * 4.0
    ours = torch.randn(4, 3, 20, 20)
    discriminator = Discriminator(3)
    loss = AdversarialLoss(alpha=1.0, discriminator_weight=1.0, kind=kind)
    learning = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.9, 0.99))
    for _ in range(30):
        learning.zero_grad()
        loss(ours, theirs, torch.rand(4), discriminator).backward()
        learning.step()
    with torch.no_grad():
        of_student, of_teacher = discriminator(ours).mean(), discriminator(theirs).mean()
    assert of_teacher > of_student + 0.5
    ours.requires_grad_()
    for _ in range(30):
        (slope,) = torch.autograd.grad(loss(ours, theirs, torch.rand(4), discriminator), ours)
        ours = (ours - 5 * slope / slope.norm()).detach().requires_grad_()
    assert discriminator(ours).mean() > of_student + 0.5


def test_every_part_is_optimized_and_moves():
    pair = Pair(student(), teacher(), [{"adversarial": {"kind": "hinge"}}]).train()
    optimizer = build_optimizer(pair, OptimizerConfig(name="adamw", lr=1e-3))
    before = {name: value.clone() for name, value in pair.methods.named_parameters()}
    for step in range(2):  # behind gammas of 0, queries, keys and values move in the second
        optimizer.zero_grad()
        sum(pair(*batch((256, 256), seed=step)).values()).backward()  # the last attention has 2×2 cells
        optimizer.step()
    moved = {name for name, value in pair.methods.named_parameters() if not torch.equal(value, before[name])}
    # A softmax over keys does not see a constant added to each of a query's likenesses; nor do these losses one
    # added to the scores of both, as long as the hinge cuts nothing off.
    still = {name for name in before if name.endswith(("key.bias", "score.bias"))}
    assert moved | still == set(before)
    names = pair.state_dict()
    assert all("terms." + name.replace(".", ".method.", 1) in names for name in before)


def test_the_students_gradient_is_not_the_discriminators():
    """The same with a discriminator that does not learn."""
    gradients = []
    for weight in (0.0, 5.0):
        pair = Pair(student(), teacher(), [{"adversarial": {"discriminator_weight": weight}}]).train()
        torch.manual_seed(3)
        pair.methods["adversarial"].discriminator = Discriminator(3)
        torch.manual_seed(2)  # of dropout
        pair(*batch())["adversarial"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in pair.student.parameters() if p.grad is not None]))
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_only_the_shared_classes_are_judged():
    pair = Pair(student(), teacher(classes=("tree", "car", "road")), ["adversarial"]).train()
    assert pair.methods["adversarial"].discriminator.norm.num_features == 2
    assert pair(*batch())["adversarial"].isfinite()


def test_without_gradients_it_is_the_students_term():
    pair = Pair(student(), teacher(), ["adversarial"]).eval()
    with torch.no_grad():
        without = pair(*batch())["adversarial"]
    torch.testing.assert_close(pair(*batch())["adversarial"].detach(), without)
