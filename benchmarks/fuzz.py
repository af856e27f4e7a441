"""Mutate what a user can give, and count tracebacks, hangs and silent acceptances.

    python benchmarks/fuzz.py                                  # 600 mutations, some ten minutes on two cores
    python benchmarks/fuzz.py --only coco recipe --mutations 80 --seed 3
    python benchmarks/fuzz.py --only weights --case 17 --keep   # one case again; its folder stays

Each case copies a tiny project (COCO, VOC, YOLO, label maps, weights, an ONNX file, a run folder, a study),
mutates one thing in it and runs the command line in a process of its own. Every case is a function of (seed,
kind, number).

Counted as failures:

- traceback: a command ends with another code than 0, 2 or 75, or prints a traceback;
- hang: a command runs longer than 20 s;
- mute: a command ends with code 2 and no line that starts with "error";
- accepted: `check` ends with 0 and a training step on the same recipe is then refused.

Prints the counts by kind and exits with 1 if there is any failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from detdistill.recipe.methods import IMAOptions, MaskOptions, MethodConfig
from detdistill.recipe.models import FCOSConfig
from detdistill.recipe.sections import (
    AugmentConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

HANG_S, MEMORY = 20, 12 * 2**30
CLASSES = ("red", "green", "blue")
STUDENT = {
    "family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1, "size": [64, 64],
}  # fmt: skip
TRAINING = {"max_steps": 2, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"}
ONE_STEP = ["training.max_steps=1"]

Commands = list[list[str]]
"""The arguments of one command after another; of ``check`` then ``train`` the second must not refuse."""


# --- the project that is mutated -------------------------------------------------------------------------


def make_project(root: Path) -> None:
    """Data in every format, a recipe for each, weights, an ONNX file, a finished run and a study."""
    draw = random.Random(0)
    photographs: dict[str, list[tuple[str, list[tuple[int, list[int]]]]]] = {"train": [], "val": []}
    for part, count in (("train", 8), ("val", 4)):
        (root / "coco" / part).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((64, 80, 3), 40, np.uint8)
            objects = []
            for _ in range(2):
                label, x, y, side = (
                    draw.randrange(3),
                    draw.randrange(50),
                    draw.randrange(36),
                    draw.randrange(12, 26),
                )
                pixels[y : y + side, x : x + side, label] = 230
                objects.append((label, [x, y, side, side]))
            Image.fromarray(pixels).save(root / "coco" / part / f"{i}.jpg")
            photographs[part].append((f"{i}.jpg", objects))
    for part, images in photographs.items():
        _write_coco(root / "coco" / "annotations" / f"instances_{part}.json", images)
        _write_voc(root, part, images)
        _write_yolo(root / "yolo", root / "coco", part, images)
        _write_label_maps(root / "maps", root / "coco", part, images)
    (root / "yolo" / "data.yaml").write_text(
        yaml.safe_dump({"train": "images/train", "val": "images/val", "names": list(CLASSES)})
    )
    (root / "maps" / "classes.json").write_text(json.dumps({"classes": ["none", *CLASSES]}))
    for name, section in {
        "coco": {"student": STUDENT},
        "voc": {"student": STUDENT},
        "yolo": {"student": STUDENT},
        "masks": {"data": "coco", "student": {**STUDENT, "family": "mask_rcnn", "head_depth": None}},
        "maps": {"student": {"family": "pspnet", "backbone": "mobilenetv3_small_050", "channels": 16}},
    }.items():
        recipe = {"name": name, "data": name, "training": TRAINING, **section}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    run(root, ["train", "coco.yaml", "--out", "runs/teacher"], must=True)
    pair = {"base": "coco.yaml", "name": "pair", "teacher": "runs/teacher", "methods": ["ima"]}
    (root / "pair.yaml").write_text(yaml.safe_dump(pair))
    export = ["export", "runs/teacher", "--size", "64", "64", "--out", "student.onnx"]
    run(root, export, must=True)
    shutil.copy(root / "runs/teacher/student.safetensors", root / "weights.safetensors")
    study = {"recipe": "pair.yaml", "seeds": [0], "arms": {"baseline": None, "ima": "ima"}}
    (root / "study.yaml").write_text(yaml.safe_dump(study))


def _write_coco(file: Path, images: Sequence[Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    rows, objects = [], []
    for i, (name, found) in enumerate(images):
        rows.append({"id": i, "file_name": name, "height": 64, "width": 80})
        for label, (x, y, w, h) in found:
            objects.append({
                "id": len(objects) + 1, "image_id": i, "category_id": label + 1, "bbox": [x, y, w, h],
                "iscrowd": 0,
                "area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            })  # fmt: skip
    categories = [{"id": i + 1, "name": name, "supercategory": "blob"} for i, name in enumerate(CLASSES)]
    file.write_text(json.dumps({"images": rows, "annotations": objects, "categories": categories}))


def _write_voc(root: Path, part: str, images: Sequence[Any]) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "voc" / folder).mkdir(parents=True, exist_ok=True)
    stems = []
    for name, found in images:
        stem = f"{part}{Path(name).stem}"
        stems.append(stem)
        shutil.copy(root / "coco" / part / name, root / "voc" / "JPEGImages" / f"{stem}.jpg")
        objects = "".join(
            f"<object><name>{CLASSES[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
            f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in found
        )
        (root / "voc" / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>80</width><height>64</height>"
            f"<depth>3</depth></size>{objects}</annotation>"
        )
    (root / "voc" / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(stems) + "\n")


def _write_yolo(root: Path, photographs: Path, part: str, images: Sequence[Any]) -> None:
    shutil.copytree(photographs / part, root / "images" / part)
    (root / "labels" / part).mkdir(parents=True)
    for name, found in images:
        rows = [f"{k} {(x + w / 2) / 80} {(y + h / 2) / 64} {w / 80} {h / 64}" for k, (x, y, w, h) in found]
        (root / "labels" / part / f"{Path(name).stem}.txt").write_text("\n".join(rows) + "\n")


def _write_label_maps(root: Path, photographs: Path, part: str, images: Sequence[Any]) -> None:
    shutil.copytree(photographs / part, root / "images" / part)
    (root / "labels" / part).mkdir(parents=True)
    for name, found in images:
        numbers = np.zeros((64, 80), np.uint8)
        for label, (x, y, w, h) in found:
            numbers[y : y + h, x : x + w] = label + 1
        Image.fromarray(numbers).save(root / "labels" / part / f"{Path(name).stem}.png")


# --- mutations -------------------------------------------------------------------------------------------

HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.7, 0.0, -0.5, 1e-308, 1e30, 1e308, float("nan"), float("inf"), 2**31,
    2**63,
    10**12, HUGE, "", "0", "1", "no", "nan", "-1", "a" * 5000, "a/../../b", "/etc/passwd", "..", "$x^$",
    "[/b]x", "a|b",
    "\u0000", "\ud800", "\u202e", "é", "e\u0301", ":car:", "\x1b[31m", "<script>", [], {}, [[]], [None], [0, 0],
    "1234", [0.1, 0.2, 0.3, 0.4], [[900, 900, 950, 900, 950, 950]],
    [1, 2, 3, 4, 5], [[1, 2], [3]], {"a": {"b": [1]}}, ["x"] * 100,
)  # fmt: skip
TOKENS = (
    "", "0", "-1", "nan", "inf", "1e400", "9" * 400, "1.5", "0x10", "é", "\u0000", "a b", "<", "&", "%", "'",
    '"',
    "None", "true", "..", "/etc", "\ufeff", "[", "{", "0,5",
    "0 .5 .5 .2 .2 .9 7", "Object", "&#xD800;", "\\ud800",
)  # fmt: skip


def mutate_tree(tree: Any, draw: random.Random) -> str:
    """Change one place of nested dictionaries and lists; returns what was done."""
    places = list(_places(tree))
    holder, key, path = draw.choice(places)
    how = draw.choice(("value", "value", "value", "delete", "wrap", "twice", "swap", "rename"))
    if how == "delete":
        del holder[key]
    elif how == "wrap":
        holder[key] = [holder[key]]
    elif how == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how == "swap":
        other, name, _ = draw.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif how == "rename" and isinstance(holder, dict):
        holder[draw.choice(("x", "", "0", f"{key}s", str(key).upper()))] = holder.pop(key)
    else:
        how, holder[key] = "value", draw.choice(VALUES)
        return f"{path} = {str(holder[key])[:40]!r}"
    return f"{how} {path}"


def _places(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key, f"{path}.{key}"
        yield from _places(value, f"{path}.{key}")


def mutate_text(text: str, draw: random.Random) -> tuple[bytes, str]:
    """Change an encoding, a line or a word of a text."""
    lines = text.splitlines() or [""]
    at = draw.randrange(len(lines))
    how = draw.choice(
        ("bom", "utf16", "latin1", "nul", "crlf", "cut", "line twice", "no line", "word", "word", "word")
    )
    if how in ("bom", "utf16", "latin1"):
        accented = text.replace("e", "é", 1) if how == "latin1" else text
        return accented.encode(
            {"bom": "utf-8-sig", "utf16": "utf-16", "latin1": "latin-1"}[how], "replace"
        ), how
    if how == "word":
        words = re.split(r"([\s<>,:]+)", lines[at])
        place = draw.randrange(len(words))
        words[place] = draw.choice(TOKENS)
        lines[at] = "".join(words)
        how = f"line {at + 1}: {lines[at][:60]!r}"
    elif how == "line twice":
        lines.insert(at, lines[at])
    elif how == "no line":
        del lines[at]
    elif how == "nul":
        lines[at] += "\0"
    elif how == "cut":
        return text[: draw.randrange(len(text) + 1)].encode(), how
    return ("\r\n" if how == "crlf" else "\n").join([*lines, ""]).encode("utf-8", "surrogatepass"), how


def mutate_file(file: Path, draw: random.Random) -> str:
    """Damage a file, or put something else in its place."""
    content = file.read_bytes() or b"\n"  # a lock is empty
    how = draw.choice(
        ("empty", "cut", "bits", "bits", "noise", "zeros", "gone", "folder", "loop", "dangling", "fifo")
    )
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "dangling":
        file.symlink_to("nowhere")
    elif how == "fifo":
        os.mkfifo(file)
    elif how != "gone":
        changed = bytearray(content)
        for _ in range(8 if how == "bits" else 0):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        if how == "cut":
            changed = changed[: draw.randrange(len(changed))]
        elif how == "noise":
            changed = bytearray(draw.randbytes(len(changed)))
        file.write_bytes({"empty": b"", "zeros": bytes(len(content))}.get(how, bytes(changed)))
    return f"{how}: {file.name}"


def dump_json(tree: Any) -> str:
    text = json.dumps(tree, default=str)
    return text if len(text) % 3 else text.replace(str(HUGE), "1e400")


# --- the kinds of cases ----------------------------------------------------------------------------------


def case_recipe(root: Path, draw: random.Random) -> tuple[str, Commands]:
    name = draw.choice(("coco", "pair", "maps", "masks"))
    file = root / f"{name}.yaml"
    if draw.random() < 0.3:
        content, what = mutate_text(file.read_text(), draw)
        file.write_bytes(content)
    else:
        tree = yaml.safe_load(file.read_text())
        what = mutate_tree(tree, draw)
        file.write_text(yaml.safe_dump(tree, allow_unicode=draw.random() < 0.5), errors="surrogatepass")
    return f"{name}: {what}", checked(file.name)


SECTIONS = {
    "data": DataConfig, "student": FCOSConfig, "teacher": FCOSConfig, "training": TrainingConfig,
    "training.augment": AugmentConfig, "training.optimizer": OptimizerConfig,
    "training.schedule": ScheduleConfig,
    "methods.ima": MethodConfig, "methods.ima.options": IMAOptions, "methods.ima.options.mask": MaskOptions,
}  # fmt: skip


def case_override(root: Path, draw: random.Random) -> tuple[str, Commands]:
    section = draw.choice(list(SECTIONS))
    key = draw.choice(list(SECTIONS[section].model_fields))
    value = (
        yaml.safe_dump(draw.choice(VALUES), default_flow_style=True, width=10**6)
        .strip()
        .removesuffix("...")
        .strip()
    )
    override = f"{section}.{key}={value}".replace("\0", "")
    return override[:80], checked("pair.yaml", override.encode("utf-8", "replace").decode())


def case_coco(root: Path, draw: random.Random) -> tuple[str, Commands]:
    part, recipe = draw.choice(("train", "val")), draw.choice(("coco.yaml", "masks.yaml"))
    file = root / "coco" / "annotations" / f"instances_{part}.json"
    tree = json.loads(file.read_text())
    what = "; ".join(mutate_tree(tree, draw) for _ in range(draw.choice((1, 1, 3))))
    file.write_text(dump_json(tree))
    return f"{recipe} {part}{what}", checked(recipe)


def case_files(root: Path, draw: random.Random) -> tuple[str, Commands]:
    """Any file of any data set, as text or as a file."""
    kind = draw.choice(("coco", "voc", "yolo", "maps"))
    files = sorted(path for path in (root / kind).rglob("*") if path.is_file())
    by_type = {
        suffix: [path for path in files if path.suffix == suffix] for suffix in {f.suffix for f in files}
    }
    file = draw.choice(by_type[draw.choice(sorted(by_type))])
    return f"{kind}: {mutate_file(file, draw)}", checked(f"{kind}.yaml")


def case_text(root: Path, draw: random.Random) -> tuple[str, Commands]:
    """Lists, labels and XML, as text."""
    kind = draw.choice(("voc", "yolo", "yolo", "maps"))
    suffixes = (".txt", ".xml", ".yaml", ".json")
    files = sorted(path for path in (root / kind).rglob("*") if path.suffix in suffixes)
    file = draw.choice(files)
    content, what = mutate_text(file.read_text(), draw)
    file.write_bytes(content)
    return f"{kind}: {file.name}: {what}", checked(f"{kind}.yaml")


def case_weights(root: Path, draw: random.Random) -> tuple[str, Commands]:
    """The header of a .safetensors file, or its bytes; as a model, a teacher and a start."""
    file = root / "weights.safetensors"
    if draw.random() < 0.3:
        what = mutate_file(file, draw)
    else:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        spec = json.loads(header["__metadata__"]["spec"])
        what = mutate_tree(spec, draw)
        header["__metadata__"]["spec"] = dump_json(spec)
        written = json.dumps(header).encode()
        file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    use: Commands = draw.choice((
        [["predict", file.name, "coco/val/0.jpg", "--out", "predicted"]],
        checked("coco.yaml", f"student.weights={file.name}"),
        checked("pair.yaml", f"teacher={file.name}"),
        [["evaluate", file.name, "--data", "coco", "--workers", "0"]],
    ))  # fmt: skip
    return what, use


def case_onnx(root: Path, draw: random.Random) -> tuple[str, Commands]:
    file = root / "student.onnx"
    if draw.random() < 0.5:
        what = mutate_file(file, draw)
    else:
        import onnx

        model = onnx.load(file)
        field = draw.choice(list(model.metadata_props))
        try:
            tree = [json.loads(field.value)]
        except ValueError:
            tree = [field.value]
        what = f"{field.key} {mutate_tree(tree, draw)}"
        value = tree[0] if tree else ""
        text = value if isinstance(value, str) else dump_json(value)
        field.value = text.encode("utf-8", "replace").decode()
        onnx.save(model, file)
    return what, [["predict", file.name, "coco/val/0.jpg", "--out", "predicted"]]


def case_run(root: Path, draw: random.Random) -> tuple[str, Commands]:
    """A file of a run folder, before the run goes on or is read."""
    folder = root / "runs" / "teacher"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".csv"))
    files = [path for path in files if "tensorboard" not in path.parts]
    file = draw.choice(files)
    if file.suffix in (".json", ".jsonl", ".yaml") and draw.random() < 0.6:
        content, what = mutate_text(file.read_text(), draw)
        file.write_bytes(content)
    else:
        what = mutate_file(file, draw)
    if draw.random() < 0.5 and file.name != "result.json":
        (folder / "result.json").unlink()
    use = draw.choice((
        ["train", "coco.yaml", "--out", "runs/teacher"],
        ["evaluate", "runs/teacher", "--workers", "0"],
        ["report", "runs/teacher"],
        ["predict", "runs/teacher", "coco/val", "--out", "predicted"],
    ))  # fmt: skip
    return f"{use[0]}, {file.name}: {what}", [use]


def case_study(root: Path, draw: random.Random) -> tuple[str, Commands]:
    tree = yaml.safe_load((root / "study.yaml").read_text())
    what = mutate_tree(tree, draw)
    (root / "study.yaml").write_text(yaml.safe_dump(tree), errors="surrogatepass")
    return what, [["compare", "study.yaml", "--table", "--out", "compared"]]


ARGUMENTS: tuple[tuple[str, ...], ...] = (
    ("train", "coco.yaml", "--out", "@"), ("train", "@"), ("check", "@"), ("check", "coco.yaml", "@"),
    ("evaluate", "@"), ("evaluate", "runs/teacher", "--data", "@"),
    ("evaluate", "runs/teacher", "--batch-size", "@"),
    ("evaluate", "runs/teacher", "--results", "@", "--workers", "0"), ("predict", "@", "coco/val"),
    ("predict", "runs/teacher", "@"), ("predict", "runs/teacher", "coco/val", "--out", "@"),
    ("predict", "runs/teacher", "coco/val", "--threshold", "@"),
    ("benchmark", "runs/teacher", "--size", "@", "@"),
    ("benchmark", "@"), ("export", "runs/teacher", "--size", "@", "@"),
    ("export", "runs/teacher", "--out", "@"),
    ("export", "@"), ("quantize", "student.onnx", "@"), ("quantize", "@", "coco/val"), ("compare", "@"),
    ("compare", "pair.yaml", "--methods", "@", "--table"), ("compare", "pair.yaml", "--seeds", "@", "--table"),
    ("sweep", "pair.yaml", "@", "--table"), ("ablate", "@", "--table"), ("analyze", "@"), ("report", "@"),
    ("rank-teachers", "pair.yaml", "--teachers", "@"), ("methods", "@"), ("models", "--backbones", "@"),
    ("import-mmdet", "@"), ("check", "coco.yaml", "--device", "@"),
    ("evaluate", "runs/teacher", "--device", "@"),
)  # fmt: skip
WORDS = (
    "", " ", "-1", "0", "1e400", "nan", "99999999999999999999", "x" * 300, "x" * 5000, "..", "/", "/dev/null",
    "/dev/zero",
    "/proc/self/mem", "coco", "coco.yaml", "weights.safetensors", "coco/val/0.jpg", "missing",
    "missing/x.yaml", "fifo",
    "loop", "é\udce9", "a=b", "=", "a.b.c=1",
    "student.size=[1,", "[", "*", "**", "--", "none", "ima", "cuda:99", "mps",
    "student.channels=1,2", "methods.ima.options.alpha=1,x", "$HOME", "a\nb",
)  # fmt: skip


def case_arguments(root: Path, draw: random.Random) -> tuple[str, Commands]:
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    words = [draw.choice(WORDS) if word == "@" else word for word in draw.choice(ARGUMENTS)]
    return " ".join(words)[:90], [words]


def checked(recipe: str, *overrides: str) -> Commands:
    return [["check", recipe, *overrides], ["train", recipe, *overrides, *ONE_STEP, "--out", "runs/fuzz"]]


KINDS: dict[str, Callable[[Path, random.Random], tuple[str, Commands]]] = {
    "recipe": case_recipe, "override": case_override, "coco": case_coco, "files": case_files, "text": case_text,
    "weights": case_weights, "onnx": case_onnx, "run": case_run, "study": case_study,
    "arguments": case_arguments,
}  # fmt: skip


# --- running ---------------------------------------------------------------------------------------------


def run(folder: Path, arguments: Sequence[str], must: bool = False) -> tuple[str, str]:
    """Run one command in a forked process: how it ended ("0", "2", "traceback", "hang", "mute"), its output."""
    log = folder / "fuzz.log"
    child = os.fork()
    if child == 0:
        _become(folder, log, arguments)
    deadline = time.monotonic() + HANG_S * (10 if must else 1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang", log.read_text(errors="replace")
        time.sleep(0.01)
    code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
    if must and code != 0:
        raise SystemExit(f"the project cannot be made: {' '.join(arguments)}\n{said}")
    if code not in (0, 2, 75) or "Traceback" in said or "panicked" in said:
        return "traceback", f"exit {code}\n{said}"
    if code == 2 and not re.search(r"^error", said, re.MULTILINE):
        return "mute", said
    return str(code), said


def _become(folder: Path, log: Path, arguments: Sequence[str]) -> None:
    """In the child: run the command line, and end."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        target = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (target, 1), (target, 2)):
            os.dup2(old, new)
        from detdistill.cli import main

        code = main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def try_case(project: Path, seed: int, kind: str, number: int, keep: bool) -> tuple[str, str, str]:
    """(outcome, what was mutated, what was printed) of one case."""
    draw = random.Random(f"{seed} {kind} {number}")
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-{number}-"))
    try:
        shutil.copytree(project, folder, dirs_exist_ok=True, symlinks=True)
        what, commands = KINDS[kind](folder, draw)
        outcomes = []
        for arguments in commands:
            outcome, said = run(folder, arguments)
            outcomes.append(outcome)
            if outcome != "0":
                break
        if outcomes == ["0", "2"]:
            outcomes.append("accepted")
        return outcomes[-1], what, f"$ detdistill {' '.join(arguments)}\n{said}"
    finally:
        if keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=600, help="cases over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cases")
    parser.add_argument("--case", type=int, help="run this case of each kind alone")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases, and print them")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}

    import torch

    import detdistill.cli
    import detdistill.training.train  # noqa: F401 - children start with it

    torch.set_num_threads(1)  # threads do not survive a fork
    started = time.monotonic()
    bad = ("traceback", "hang", "mute", "accepted")
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-project-") as project,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        make_project(Path(project))
        each = -(-options.mutations // len(options.only))
        numbers = range(each) if options.case is None else [options.case]
        cases = [(kind, number) for number in numbers for kind in options.only]
        results = pool.map(lambda case: try_case(Path(project), options.seed, *case, options.keep), cases)
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in options.only}
        for (kind, number), (outcome, what, said) in zip(cases, results, strict=True):
            counts[kind][outcome] += 1
            if outcome in bad or options.case is not None:
                print(f"--- {kind} {number}: {outcome}: {what!r}\n{said.strip()[-1500:]}", flush=True)
    print(f"{'kind':>10}  cases  refused  accepted  failures")
    for kind, count in counts.items():
        failures = ", ".join(f"{count[name]} {name}" for name in bad if count[name]) or "0"
        print(f"{kind:>10}  {count.total():5}  {count['2']:7}  {count['0']:8}  {failures}")
    total = sum(counts.values(), Counter())
    print(
        f"{total.total()} mutations, seed {options.seed}: {total['traceback']} tracebacks, "
        f"{total['hang']} hangs, {total['accepted']} silent acceptances, {total['mute']} mute refusals; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if any(total[name] for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
