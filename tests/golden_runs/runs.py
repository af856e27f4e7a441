"""Short runs whose loss terms must not change when the code is rearranged.

    python -m tests.golden_runs.runs     # record them anew: only where a change of numbers is wanted

Everything goes through recipes and run folders, so that no internal name is needed. ``losses.json`` holds each
term of each step to the last bit, and the environment in which it was recorded.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import detdistill

FILE = Path(__file__).with_name("losses.json")
HEADERS = Path(__file__).with_name("headers.json")  # of the student files that version 0.1.0 wrote
DIGITS = {"format": "digits", "train_size": 16, "val_size": 4, "image_size": 64}
TRAINING = {
    "max_steps": 12, "batch_size": 4, "workers": 0, "evaluate_every": 0, "checkpoint_every": 1, "device": "cpu",
    "pictures": False, "trackers": [],
    "optimizer": {"lr": 0.01}, "schedule": {"name": "cosine", "warmup": 3}, "augment": {"photometric": True},
}  # fmt: skip
ADAMW = {"optimizer": {"name": "adamw", "lr": 2e-4}, "clip_norm": 0.1}


def detector(family: str, channels: int = 16, **options: Any) -> dict[str, Any]:
    own = (
        {"head_depth": 2, "strides": [8, 16, 32]} if family in {"retinanet", "fcos", "gfl", "reppoints"} else {}
    )
    small = {"backbone": "mobilenetv3_small_050", "channels": channels, "norm": "frozen"}
    if family not in {"pspnet", "deeplabv3"}:
        small["size"] = 64
    return {"family": family, **small, **own, **options}


def case(student: dict[str, Any], teacher: str, methods: list[Any], **training: Any) -> dict[str, Any]:
    return {"student": student, "teacher": teacher, "methods": methods, "training": TRAINING | training}


TEACHERS = {
    "fcos": detector("fcos", 24),
    "retinanet": detector("retinanet", 24),
    "gfl": detector("gfl", 24),
    "reppoints": detector("reppoints", 24),
    "faster_rcnn": detector("faster_rcnn", 24),
    "rtdetr_v2": detector("rtdetr_v2", 32, norm="batch"),
    "pspnet": detector("pspnet", 24),
}
"""Each trained for two steps by its own recipe."""

DETECTION = {
    "alone": {"student": detector("fcos", norm="batch"), "training": TRAINING | {"accumulate": 2}},
    "retinanet": case(detector("retinanet"), "fcos", [{"ima": {"preset": "paper"}}, "fgfi"], ema=0.9),
    "fcos": case(detector("fcos"), "retinanet", ["mgd", "cwd", "pkd", {"mimic": {"weight": "auto"}}]),
    "gfl": case(detector("gfl"), "gfl", ["ld", "kd", "crosskd", "gid"]),
    "reppoints": case(detector("reppoints"), "reppoints", ["fgd", "frs", "scalekd"], augment={"crop": 0.5}),
    "faster_rcnn": case(
        detector("faster_rcnn", norm="batch"), "faster_rcnn",
        ["ima", "defeat", "fkd", {"cofd": {"strides": [16]}}], accumulate=2,
    ),
    "mask_rcnn": case(detector("mask_rcnn", strides=[8, 16, 32]), "faster_rcnn", ["ima", "at"]),
    "cascade_rcnn": case(detector("cascade_rcnn"), "fcos", [{"maskd": {"token_fraction": 0.5}}]),
    "cascade_mask_rcnn": case(detector("cascade_mask_rcnn"), "faster_rcnn", ["pkd"], clip_norm=1.0),
    "rtdetr_v2": case(detector("rtdetr_v2", 32, norm="batch"), "fcos", ["ima"], **ADAMW),
    "d_fine": case(detector("d_fine", 32, norm="batch"), "rtdetr_v2", ["pkd"], **ADAMW),
    "unlabeled": case(
        detector("fcos"), "retinanet", ["ima"], unlabeled_batch=2, augment={"multi_scale": [0.8, 1.2]},
    ),
    "unequal": case(detector("fcos", size=48), "retinanet", ["ima", "mimic"]),
    "inherit": case(detector("fcos", 24), "fcos", ["mimic"]) | {"inherit": True},
    "learns": {
        "student": detector("fcos", norm="batch"),
        "training": TRAINING
        | {"max_steps": 60, "batch_size": 8, "optimizer": {"lr": 0.04}, "checkpoint_every": 500},
    },
}  # fmt: skip

SEGMENTATION = {
    "pspnet": case(detector("pspnet"), "pspnet", ["ima", "skds", "ifvd", "dist", "skd"]),
    "deeplabv3": case(detector("deeplabv3", norm="batch"), "pspnet", ["cirkd", "adversarial", "kd"], ema=0.9),
}

CASES = DETECTION | SEGMENTATION
BY_TWO = "fcos by two processes"


def make_label_maps(root: Path, val: int = 4) -> Path:
    """Two halves and a corner of other colors; the first rows have no label."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels_HW = np.zeros((48, 64), np.uint8)
            labels_HW[:, rng.integers(12, 50) :] = 1
            labels_HW[30:, :10] = 2
            image = (np.eye(3)[labels_HW] * 180 + rng.integers(0, 60, (48, 64, 3))).astype(np.uint8)
            labels_HW[:3] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(labels_HW).save(root / "labels" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps({"classes": ["road", "sky", "tree"]}))
    return root


class Workshop:
    """A folder in which the runs are made; each teacher is trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._label_maps: Path | None = None

    def recipe(self, name: str) -> Path:
        """The recipe file of a case, with its teacher trained."""
        tree = dict(CASES[name])
        tree["data"] = self._data(tree["student"]["family"])
        if name == "unlabeled":
            tree["data"] = {**tree["data"], "unlabeled": str(self._images())}
        if "teacher" in tree:
            tree["teacher"] = str(self._teacher(tree["teacher"]))
        return self._write(name, tree)

    def train(self, name: str) -> list[dict[str, float]]:
        """The rows of a run: loss terms, weights and gradient norm by step, and the numbers at its end."""
        return rows(detdistill.train(self.recipe(name), out=self.folder / "runs" / name).run)

    def train_in_two_processes(self, name: str) -> list[dict[str, float]]:
        """As :meth:`train`, started as ``torchrun`` would."""
        run = self.folder / "runs" / f"{name}_by_two"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launcher, "-m", "detdistill", "train", str(self.recipe(name)), "--out", str(run)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
        assert done.returncode == 0, done.stderr
        return rows(run)

    def _data(self, family: str) -> dict[str, Any]:
        if family not in SEGMENTATION:
            return DIGITS
        if self._label_maps is None:
            self._label_maps = make_label_maps(self.folder / "label_maps")
        return {"root": str(self._label_maps)}

    def _images(self) -> Path:
        folder = self.folder / "unlabeled"
        if not folder.exists():
            folder.mkdir()
            rng = np.random.default_rng(1)
            for i in range(5):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 48)).save(folder / f"{i}.png")
        return folder

    def _teacher(self, family: str) -> Path:
        run = self.folder / "teachers" / family
        if not run.exists():
            training = TRAINING | {"max_steps": 2, "seed": 1}
            tree = {"data": self._data(family), "student": TEACHERS[family], "training": training}
            detdistill.train(self._write(f"teacher_{family}", tree), out=run)
        return run

    def _write(self, name: str, tree: dict[str, Any]) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"name": name, **tree}))
        return file


def rows(run: Path) -> list[dict[str, float]]:
    """A run's log without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def header(file: Path) -> dict[str, Any]:
    """What a student file says of its model, and the shapes of its tensors."""
    with safe_open(file, "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        return {"metadata": opened.metadata(), "shapes": shapes}


def environment() -> dict[str, str]:
    """What the last bit depends on."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def record() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETDISTILL_CACHE"] = f"{folder}/cache"
        workshop = Workshop(Path(folder))
        found = {name: workshop.train(name) for name in CASES}
        found[BY_TWO] = workshop.train_in_two_processes("fcos")
        files = {name: header(workshop.folder / "runs" / name / "student.safetensors") for name in CASES}
    FILE.write_text(json.dumps({"environment": environment(), "cases": found}, indent=0))
    HEADERS.write_text(
        "{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(file)}" for name, file in files.items()) + "}\n"
    )


if __name__ == "__main__":
    record()
