"""Methods for segmenters alone: what their memories, labels and logits are, on pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detdistill.distillation.methods.cirkd import Memory
from detdistill.distillation.methods.cwd import CWDLoss
from detdistill.distillation.methods.kd import KDLoss
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import Preprocess

from .pairs import detector
from .test_segmentation_pairs import batch, student, teacher


def raw_of(model, images, targets=None):
    inputs = model.preprocess(images, targets)
    return model.forward_head(model.forward_features(inputs), inputs)


def test_kd_is_the_divergence_of_the_logits() -> None:
    pair = Pair(student(), teacher(), [{"kd": {"temperature": 2.0}}]).eval()
    images, targets = batch()
    with torch.no_grad():
        term = pair(images, targets)["kd"]
        ours, theirs = (raw_of(model, images).logits_NQHW for model in (pair.student, pair.teacher))
        valid = torch.ones(len(images), *theirs.shape[-2:], dtype=torch.bool)
        expected = KDLoss(temperature=2.0).pixels(ours, theirs, valid)
    torch.testing.assert_close(term, expected)


def test_kd_meets_classes_by_name() -> None:
    teacher_classes = ("tree", "car", "road", "sky")
    pair = Pair(student(), teacher(teacher_classes), ["kd"]).eval()
    images, targets = batch()
    with torch.no_grad():
        term = pair(images, targets)["kd"]
        ours, theirs = (raw_of(model, images).logits_NQHW for model in (pair.student, pair.teacher))
        valid = torch.ones(len(images), *theirs.shape[-2:], dtype=torch.bool)
        torch.testing.assert_close(term, KDLoss().pixels(ours, theirs[:, [2, 3, 0]], valid))


def test_cwd_adds_its_logits() -> None:
    options = [{"cwd": {"logits_alpha": alpha}} for alpha in (0.0, 3.0)]
    images, targets = batch()
    with torch.no_grad():
        without, with_logits = (
            Pair(student(), teacher(), [option]).eval()(images, targets)["cwd"] for option in options
        )
        logits = [raw_of(model().eval(), images).logits_NQHW for model in (student, teacher)]
    torch.testing.assert_close(
        with_logits - without, CWDLoss(alpha=3.0, tau=4.0)(*logits), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UserError, match="logits_alpha is for segmenters"):
        Pair(detector(), detector(channels=24), [{"cwd": {"logits_alpha": 3.0}}])


@pytest.mark.parametrize("name", ["kd", "dist", "skds", "cwd"])
def test_the_teachers_classifier_runs_for_logits_alone(name: str) -> None:
    for methods, expected in (([name], 1), (["mimic"], 0)):
        pair = Pair(student(), teacher(), methods).train()
        runs = []
        pair.teacher.head.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        pair(*batch())
        assert len(runs) == expected


def cirkd_pair(**options):
    torch.manual_seed(3)
    places = {"pixel_places": 40, "region_places": 6, "pixel_contrasts": 12, "region_contrasts": 6}
    return Pair(student(), teacher(), [{"cirkd": {**places, **options}}]).train()


def test_queues_hold_the_teachers_pixels_of_their_own_class() -> None:
    """The published code enqueued pixels of the image at places counted within the class."""
    pair = cirkd_pair()
    images, targets = batch()
    pair(images, targets)
    with torch.no_grad():
        inputs = pair.teacher.preprocess(images, targets)
        feature = torch.nn.functional.normalize(pair.teacher.forward_features(inputs)[8], dim=1)
    labels = torch.stack([target["semantic"] for target in targets])[:, 4::8, 4::8]
    memories = pair.methods["cirkd"].memories
    added = memories["pixel"].next_Q.tolist()
    for q in range(3):
        of_class = feature.transpose(0, 1)[:, labels == q].T
        assert added[q] == sum(min(16, int((labels[n] == q).sum())) for n in range(2))
        for row in memories["pixel"].queue_QLC[q, : added[q]]:
            assert (of_class - row).abs().amax(dim=1).min() < 1e-5
        means = [feature[n][:, labels[n] == q].mean(dim=1) for n in range(2) if (labels[n] == q).any()]
        for k, mean in enumerate(means):
            expected = torch.nn.functional.normalize(mean, dim=0)
            torch.testing.assert_close(memories["region"].queue_QLC[q, k], expected, atol=1e-5, rtol=1e-4)


def test_a_memory_goes_by_the_cells_of_the_teacher() -> None:
    """The student's input is padded (60 columns in 64), the teacher's is not: their cells do not coincide."""
    small, large = (Preprocess(size=size, divisor=8) for size in ((48, 64), (96, 128)))
    options = {"pixel_places": 40, "region_places": 6}
    pair = Pair(student(preprocess=small), teacher(preprocess=large), [{"cirkd": options}]).train()
    images = [torch.rand(3, 80, 100)]
    labels_HW = torch.zeros(80, 100, dtype=torch.uint8)
    labels_HW[:, 88:] = 1  # from column 105.6 of the teacher's 120: the cells 13 and 14 of 15
    with torch.no_grad():
        pair.eval()
        feature = pair.teacher.forward_features(pair.teacher.preprocess(images))[8][0]
        assert feature.shape[-2:] == (12, 15)
        # One image is too little for the BatchNorm of a student in training.
        pair.methods.train()
        pair(images, [{"semantic": labels_HW}])
    unit = torch.nn.functional.normalize(feature, dim=0)
    regions = pair.methods["cirkd"].memories["region"].queue_QLC
    for q, cells in ((0, unit[:, :, :13]), (1, unit[:, :, 13:])):
        expected = torch.nn.functional.normalize(cells.mean(dim=(1, 2)), dim=0)
        torch.testing.assert_close(regions[q, 0], expected, atol=1e-5, rtol=1e-4)


def test_a_resumed_memory_goes_on_as_one_that_was_not_stopped() -> None:
    whole = cirkd_pair()
    for step in range(2):
        whole.at_step(step, 4)
        whole(*batch(seed=step))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    assert any("queue" in name for name in state)
    again = cirkd_pair()
    again.load_state_dict(state)
    terms = []
    for pair in (whole, again):
        pair.at_step(2, 4)
        torch.manual_seed(0)  # of dropout
        terms.append(pair(*batch(seed=2))["cirkd"])
    assert torch.equal(*terms)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in whole.state_dict().items())


def remember(rank: int, world: int, folder: str) -> None:
    """Half of the features in each of two processes, or all of them in one."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    memory, features, valid = Memory(3, 4, 5), torch.randn(3, 8, 4), torch.rand(3, 8) > 0.4
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    memory.add(features[:, share], valid[:, share])
    torch.save(memory.state_dict(), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_processes_share_one_memory(tmp_path: Path) -> None:
    remember(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(remember, (2, str(tmp_path)), nprocs=2)
    alone, *shared = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert alone["next_Q"].any()
    for state in shared:
        assert torch.equal(state["next_Q"], alone["next_Q"])
        # The last place holds what is not kept.
        assert torch.equal(state["queue_QLC"][:, :-1], alone["queue_QLC"][:, :-1])


def test_nothing_is_remembered_in_evaluation() -> None:
    pair = cirkd_pair().eval()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    pair(*batch())
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())


def test_without_labels_the_memory_stays_and_the_loss_is_finite() -> None:
    pair = cirkd_pair()
    term = pair(*batch(ignored=True))["cirkd"]
    term.backward()
    assert term.isfinite()
    memories = pair.methods["cirkd"].memories
    assert not memories["pixel"].next_Q.any()
    assert not memories["region"].next_Q.any()


@pytest.mark.parametrize("name", ["skds", "ifvd", "cirkd"])
def test_equal_networks_have_nothing_to_learn(name: str) -> None:
    torch.manual_seed(5)
    options = {"cirkd": {"pixel_weight": 0.0, "region_weight": 0.0}}.get(name, {})  # a projection is in between
    pair = Pair(teacher(), teacher(), [{name: options}]).eval()
    assert abs(float(pair(*batch())[name].detach())) < 1e-5


@pytest.mark.parametrize("option", [{"cells": 0}, {"pixel_places": 0}])
def test_wrong_options_are_told(option: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"cirkd: .*: input should be greater than or equal to 1"):
        cirkd_pair(**option)


TWO_PROCESSES = """
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from detdistill.distillation.pair import Pair
from detdistill.models import build_model

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
small = "mobilenetv3_small_050"
student, teacher = (build_model("pspnet", ["a", "b"], backbone=small, channels=c) for c in (8, 16))
pair = Pair(student, teacher, ["cirkd"])
queues = [n for n in pair.state_dict() if "queue" in n]
assert len(queues) == 2
before = {n: pair.state_dict()[n].clone() for n in queues}
both = DistributedDataParallel(pair.train(), broadcast_buffers=False)
torch.manual_seed(rank)  # each has other images
for step in range(2):
    pair.at_step(step, 4)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"semantic": torch.randint(0, 2, (64, 64))} for _ in range(2)]
    sum(both(images, targets).values()).backward()
torch.save([(before[n], pair.state_dict()[n]) for n in queues], f"{sys.argv[1]}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_memories_are_filled_alike_in_all_processes_and_do_not_travel(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, str(tmp_path / "worker.py"), str(tmp_path)], check=True, timeout=300)
    for (before, first), (_, second) in zip(
        *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True
    ):
        assert torch.equal(first, second)
        assert not torch.equal(first, before)
