"""The runs of a study: each a process of its own, spread over devices, and stopped together."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detdistill.comparison.study import Study
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from detdistill.training.preemption import PREEMPTED
from detdistill.training.run_folder import RunFolder


def launch(device: str | None) -> tuple[list[str], dict[str, str], list[str]]:
    """How a run is put on a device: what starts Python, the environment, and settings.

    GPUs are chosen by ``CUDA_VISIBLE_DEVICES``, which is not part of a recipe; of those that are visible now. A
    run on several is started by torchrun.

    Raises:
        UserError: it is none.
    """
    python = [sys.executable, "-m"]
    if device in (None, "auto"):
        return python, {}, []
    if device == "cpu":
        return python, {}, ["training.device=cpu"]
    kind, _, numbers = device.partition(":")
    wanted = numbers.split(",")
    if kind != "cuda" or not all(number.isdecimal() for number in wanted):
        raise UserError(f"--device {device}: give cuda:0, cuda:0,1 (several for each run), or cpu")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and max(map(int, wanted)) >= len(visible):
        raise UserError(f"--device {device}: CUDA_VISIBLE_DEVICES names {len(visible)} only")
    names = [visible[int(number)] if visible else number for number in wanted]
    if len(wanted) > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={len(wanted)}", "-m"]
    return python, {"CUDA_VISIBLE_DEVICES": ",".join(names)}, []


def train_missing(
    study: Study,
    recipes: Mapping[str, Recipe],
    jobs: int,
    devices: Sequence[str],
    say: Callable[[str], None],
) -> set[tuple[str, int]]:
    """Train what has not ended; arguments as :func:`~detdistill.comparison.compare.run_study` has them.

    Returns:
        (arm, seed) of the runs that failed.

    Raises:
        SystemExit: with code 75 when it was stopped by SIGTERM; every run has saved.
    """
    missing = [
        (arm, seed)
        for seed in study.seeds
        for arm in study.arms
        if RunFolder(study.run_folder(arm, seed)).ended(recipes[arm]) is None
    ]
    jobs = len(devices) or max(1, jobs)
    free: queue.Queue[str | None] = queue.Queue()
    for i in range(jobs):
        free.put(devices[i] if devices else None)
    children: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()
    failed: set[tuple[str, int]] = set()

    def run(arm: str, seed: int) -> None:
        if stopped.is_set():
            return
        device = free.get()
        try:
            folder = study.run_folder(arm, seed)
            code = _train(study, arm, seed, folder, device, jobs, children)
            if code == PREEMPTED:
                stopped.set()
            if code == 0:
                outcome = "done"
            elif stopped.is_set():
                outcome = "stopped, saved"
            else:
                failed.add((arm, seed))
                outcome = f"failed: see {folder / 'log.txt'}"
            say(f"{arm}, seed {seed}: {outcome}")
        finally:
            free.put(device)

    def stop(signum: int, frame: object) -> None:
        stopped.set()
        for child in list(children):
            child.send_signal(signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: run(*job), missing))
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if stopped.is_set():
        raise SystemExit(PREEMPTED)
    return failed


def _train(
    study: Study,
    arm: str,
    seed: int,
    folder: Path,
    device: str | None,
    jobs: int,
    children: set[subprocess.Popen[bytes]],
) -> int:
    python, environment, settings = launch(device)
    changes = [
        *study.arms[arm],
        f"training.seed={seed}",
        f"name={study.out.name}-{arm}-{seed}",
        *settings,
    ]
    command = [*python, "detdistill", "train", str(study.recipe), *changes, "--out", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **environment}
    with (folder / "log.txt").open("ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        children.add(child)
        try:
            return child.wait()
        finally:
            children.discard(child)
