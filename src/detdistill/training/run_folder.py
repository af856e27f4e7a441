"""The folder that a run leaves: what was asked, where it ran, what came out, and how to go on.

::

    RUN/recipe.yaml            every setting, defaults spelled out
    RUN/environment.json       versions, machine, command
    RUN/metrics.jsonl, .csv    a row for each log interval and each evaluation
    RUN/curves.png, samples.png
    RUN/checkpoints/last.pt    to resume (tensors and plain values only); previous.pt is the one before
    RUN/data.sha256, teacher.sha256   what it began with, wherever that lies now
    RUN/student.safetensors    the baseline: what is deployed
    RUN/best.safetensors       the student at its best evaluation
    RUN/result.json            status and final metrics; only a finished run has it
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from detdistill.data.fingerprint import fingerprint
from detdistill.data.images import is_image
from detdistill.data.loading import usable_splits
from detdistill.data.records import Split
from detdistill.data.text import read_file
from detdistill.distillation.weighting import RATIO
from detdistill.errors import UserError
from detdistill.models.checkpoints.weights import file_hash, find_weights
from detdistill.output import make_folder
from detdistill.recipe import DataConfig, ModelConfig, Recipe, dump_recipe, load_recipe
from detdistill.text import is_text, printable
from detdistill.training.checkpoint import PREVIOUS, load_checkpoint, save_checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, float | int]

# Settings that may differ between the parts of one run: they do not change what is computed.
FREE = ("workers", "device", "max_time", "checkpoint_every", "trackers", "callbacks", "pictures")


class RunFolder:
    """Reads and writes one run's files; writes are atomic, so that a killed run leaves whole files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = False  # what is there is about to be replaced
        self._mark: str | None = None  # the data's fingerprint

    recipe_file = property(lambda self: self.path / "recipe.yaml")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    checkpoint_file = property(lambda self: self.path / "checkpoints" / "last.pt")
    result_file = property(lambda self: self.path / "result.json")
    student_file = property(lambda self: self.path / "student.safetensors")
    best_file = property(lambda self: self.path / "best.safetensors")
    teacher_file = property(lambda self: self.path / "teacher.sha256")
    data_file = property(lambda self: self.path / "data.sha256")

    @property
    def _written(self) -> tuple[Path, ...]:
        """What a run writes in its course, and a fresh one deletes first."""
        return (
            self.metrics_file, self.checkpoint_file, self.checkpoint_file.with_name(PREVIOUS),
            self.result_file, self.student_file, self.best_file, self.data_file, self.teacher_file,
        )  # fmt: skip

    def require_apart(self, data: DataConfig) -> None:
        """Refuse a folder in which the run's pictures or its recipe would be taken for parts of the dataset.

        A dataset's root may hold runs, even next to images; its other folders of images may not.

        Raises:
            UserError: the folder is the dataset's root, or lies in one of its folders of images; or its name is
                not UTF-8, which TensorBoard cannot write.
        """
        if not is_text(str(self.path)):
            shown = printable(str(self.path))
            raise UserError(f"{shown}: the name is not UTF-8: choose another folder with --out")
        run, top = self.path.resolve(), data.root or Path()
        for given in (data.root, data.images, data.unlabeled):
            root = (top / given).resolve() if given is not None else None
            if root is None or root not in (run, *run.parents):
                continue
            folders = [run, *run.parents]
            folders = folders[: folders.index(root) + (given is not data.root)]
            if run == root or any(_has_images(folder) for folder in folders):
                raise UserError(
                    f"{self.path} lies among the images of the dataset in {root}, where the run's pictures "
                    "would be taken for images: choose another folder with --out"
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from training in this folder. Other processes of one run are none of these.

        Raises:
            UserError: another run is being trained here.
        """
        if fcntl is None or os.environ.get("RANK", "0") != "0" or self.path.is_file():
            yield
            return
        make_folder(self.checkpoint_file.parent, "--out")
        # Record locks go with the process: none is left behind by a killed run or held by its loaders.
        with (self.checkpoint_file.parent / "lock").open("w", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
                    raise UserError(
                        f"{self.path}: another process is training here: wait for it, or choose another folder "
                        "with --out"
                    ) from None
            yield

    def open(self, recipe: Recipe, *, resume: bool) -> None:
        """Check that a run of this recipe may begin or go on here; nothing is written yet.

        Args:
            resume: go on with what is there; else :meth:`begin` deletes it.

        Raises:
            UserError: the folder holds another recipe's run, something that is no run, or the recipe's own
                teacher or weights.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: choose another run folder")
        for file in (self.recipe_file, *self._written):
            if file.is_dir():
                raise UserError(f"{file}: is a folder, and the run writes a file there: move it away")
        self._fresh = not resume
        for section in (recipe.teacher, recipe.student):
            weights = _weights(section)
            if weights is not None and weights.resolve().parent == self.path.resolve():
                raise UserError(
                    f"{self.path} holds {weights}, which the recipe needs: choose another run folder with --out"
                )
        if (
            resume
            and self.recipe_file.exists()
            and (self.has_checkpoint or self.result_file.exists() or self.metrics_file.exists())
        ):
            differing = self.differences(recipe)
            if differing:
                raise UserError(
                    f"{self.path} holds a run of another recipe ({', '.join(differing[:5])} differ): choose "
                    "another folder with --out, or --fresh to start it anew"
                )

    def begin(self, recipe: Recipe, *, write: bool = True) -> None:
        """Delete what a fresh run replaces and write what the run is; once all that it needs has been found.

        Args:
            write: false in all processes of a run but one.
        """
        fresh, self._fresh = self._fresh, False
        if not write:
            return
        if fresh:
            for file in self._written:
                file.unlink(missing_ok=True)
        self.checkpoint_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, dump_recipe(recipe))
        if (teacher := _weights(recipe.teacher)) is not None:
            write_atomically(self.teacher_file, file_hash(teacher))
        if self._mark is not None:
            write_atomically(self.data_file, self._mark)
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2))

    def recipe(self) -> Recipe:
        """What the run trains.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return load_recipe(self.recipe_file)
        except UserError as error:
            raise UserError(
                f"{error}; delete the file to resume the run unchecked, or start it anew with --fresh"
            ) from None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        files = (self.checkpoint_file, self.checkpoint_file.with_name(PREVIOUS))
        return not self._fresh and any(file.exists() for file in files)

    def differences(self, recipe: Recipe) -> list[str]:
        """The settings in which the run differs from a recipe; and its teacher's file, if that has changed.

        A teacher or a dataset that lies elsewhere now, and is the same, is no difference.
        """
        found = differences(self.recipe(), recipe)
        teacher, known = _weights(recipe.teacher), _text(self.teacher_file)
        if teacher is not None and known is not None:
            if file_hash(teacher) != known:
                found.append(f"the content of {teacher}")
            elif "teacher.weights" in found:
                found.remove("teacher.weights")
        if "data.root" in found and (known := _text(self.data_file)) is not None:
            splits = usable_splits(recipe.data, ("train", "val"))
            if fingerprint(splits) == known:
                found.remove("data.root")
        return found

    def keep_to_data(self, splits: Mapping[str, Split]) -> None:
        """Remember what the annotations say, or compare it with what they said when the run began.

        Raises:
            UserError: the run goes on, and they have changed.
        """
        mark = fingerprint(splits)
        if self.has_checkpoint and _text(self.data_file) not in (None, mark):
            raise UserError(
                f"{self.path} began with other annotations than those of {splits['train'].source} now: choose "
                "another folder with --out, or --fresh to start it anew"
            )
        self._mark = mark

    def log(self, row: Row) -> None:
        """Append a row; undefined numbers (an AP of sizes that do not occur) are left out."""
        defined = {key: value for key, value in row.items() if math.isfinite(value)}
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(defined) + "\n")

    def metrics(self) -> list[Row]:
        """The rows; the last line may be a half one, of a killed run, and is then left out.

        Raises:
            UserError: another line is damaged.
        """
        rows = [_row(line) for line in (_text(self.metrics_file) or "").splitlines()]
        if None in rows[:-1]:
            raise UserError(
                f"{self.metrics_file}:{rows.index(None) + 1}: damaged; delete the line, or start the run anew "
                "with --fresh"
            )
        return [row for row in rows if row is not None]

    def forget_after(self, step: int, evaluation: bool = False) -> None:
        """Drop the rows that a resumed run will write again; with ``evaluation`` also that of this step's."""
        rows = [
            row
            for row in self.metrics()
            if row["step"] < step or (row["step"] == step and ("loss" in row or not evaluation))
        ]
        write_atomically(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def write_csv(self) -> None:
        rows = self.metrics()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        temporary = self.path / "metrics.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path / "metrics.csv")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        save_checkpoint(self.checkpoint_file, state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        return load_checkpoint(self.checkpoint_file)

    def result(self) -> dict[str, Any] | None:
        """What came out; None of a run that has not ended.

        Raises:
            UserError: the file is damaged.
        """
        if not self.result_file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(read_file(self.result_file))
            found["metrics"] = {k: math.nan if v is None else float(v) for k, v in found["metrics"].items()}
            found["status"], found["per_class"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.result_file}: damaged ({error!r}); delete it, and the same command ends the run anew"
            ) from error
        found.setdefault("main", "AP")  # of runs before there were others
        return found

    def ended(self, recipe: Recipe) -> dict[str, Any] | None:
        """The result, unless the run ended at its time limit and the recipe now gives it more.

        Raises:
            UserError: the weights of a finished run are missing.
        """
        done = self.result()
        if done is not None and not self.student_file.is_file():
            raise UserError(
                f"{self.student_file}: missing, and {self.result_file.name} says that the run is finished: "
                f"restore it, or delete {self.result_file} and the same command writes it again from the last "
                "checkpoint"
            )
        if done is None or done["status"] != "out of time":
            return done
        limit = recipe.training.max_time
        return None if limit is None or limit > done["metrics"]["minutes"] else done

    def write_result(self, status: str, metrics: Row, per_class: Row, main: str = "AP") -> None:
        """Undefined numbers are written as null; ``main`` is the metric by which runs are compared."""
        tables = {
            name: {key: value if math.isfinite(value) else None for key, value in table.items()}
            for name, table in (("metrics", metrics), ("per_class", per_class))
        }
        write_atomically(self.result_file, json.dumps({"status": status, "main": main, **tables}, indent=2))


def _row(line: str) -> Row | None:
    """A row of metrics.jsonl; None of what is none."""
    try:
        row: Row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _has_images(folder: Path) -> bool:
    """Whether a folder that holds no run has images in it."""
    if not folder.is_dir() or (folder / "recipe.yaml").is_file():
        return False
    return any(is_image(path) for path in folder.iterdir())


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # every process of a run opens its folder
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files that are no UTF-8
    temporary.replace(path)


def _text(file: Path) -> str | None:
    if not file.exists():
        return None
    try:
        return read_file(file).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: damaged, it is no text; delete it, or start the run anew with --fresh"
        ) from None


def environment() -> dict[str, Any]:
    """Versions and machine, to explain a result later."""
    packages = ("detdistill", "torch", "torchvision", "timm", "accelerate", "hotcoco", "numpy")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
    }


def _weights(section: ModelConfig | None) -> Path | None:
    """A model's file, if it is there: without it a run cannot start, but its results can be read."""
    if section is None or section.weights in (None, "torchvision"):
        return None
    try:
        return find_weights(section.weights)
    except UserError:
        return None


def differences(old: Recipe, new: Recipe, free: Sequence[str] = FREE) -> list[str]:
    """The settings (``training.epochs``) in which two recipes differ, ``free`` ones of the training aside."""
    a, b = _flatten(_with_weights(old)), _flatten(_with_weights(new))
    untold = {f"training.{key}" for key in free} | {"name"}
    return sorted(key for key in a.keys() | b.keys() if key not in untold and not _same(a.get(key), b.get(key)))


def _with_weights(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values; recipes up to 0.1 spelled out a method's default weight and ratio."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    for method in tree["methods"]:
        for key, default in (("weight", 1.0), ("ratio", RATIO)):
            if method[key] is None:
                method[key] = default
    return tree


def _same(a: Any, b: Any) -> bool:
    """Equal, or two ways to write the path of one file."""
    if a == b or not (isinstance(a, str) and isinstance(b, str)):
        return bool(a == b)
    return Path(a).exists() and Path(b).exists() and Path(a).samefile(b)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
