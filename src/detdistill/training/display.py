"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detdistill.evaluation.measure import Evaluation
from detdistill.text import printable
from detdistill.training.callbacks import Callback, Run
from detdistill.training.run_folder import Row


class Display(Callback):
    """Shows one run; silent unless ``enabled`` (one process of many)."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(quiet=not enabled, highlight=False, markup=False, emoji=False)
        self.bar: Progress | None = None
        self.started = time.perf_counter()
        self.name, self.total = "", 0

    def start(self, name: str, step: int, total: int) -> None:
        self.name, self.total, self.started = name, total, time.perf_counter()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}", markup=False),
                console=self.console,
            )
            self.bar.add_task(printable(name, self.console.file), total=total, completed=step, losses="")
            self.bar.start()

    def on_log(self, run: Run, row: Row) -> None:
        if self.bar is None:
            return
        terms = " ".join(f"{key[5:]} {value:.3g}" for key, value in row.items() if key.startswith("loss/"))
        share = f" distilled {row['distill_share']:.0%}" if row["distill_share"] else ""
        losses = printable(f"{row['images_per_second']:.0f} img/s  {terms}{share}", self.console.file)
        self.bar.update(self.bar.task_ids[0], completed=int(row["step"]), losses=losses)

    def on_evaluate(self, run: Run, row: Row, evaluation: Evaluation) -> None:
        found = {name.replace("_", " "): row[name] for name in evaluation.headline if name in row}
        numbers = "  ".join(
            f"{name} {100 * value if math.isfinite(value) else 0.0:.1f}" for name, value in found.items()
        )
        minutes = (time.perf_counter() - self.started) / 60
        self.note(f"step {row['step']}/{self.total}  {numbers}  {minutes:.1f} min")

    def note(self, text: str) -> None:
        prefix = f"{self.name}: " if self.name else ""
        self.console.print(printable(prefix + text, self.console.file), soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
