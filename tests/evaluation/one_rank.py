"""One of several processes that evaluate together: python one_rank.py RANK RANKS IMAGES FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from conftest import build_oracle
from detdistill.evaluation.detector import evaluate_detector

rank, ranks, images = map(int, sys.argv[1:4])
folder = Path(sys.argv[4])
own = folder / str(rank)
own.mkdir()
distributed.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=ranks)
evaluation = evaluate_detector(*build_oracle(own, images), batch_size=2)
torch.save({"AP": evaluation.coco.AP, "detections": evaluation.detections}, folder / f"{rank}.pt")
distributed.destroy_process_group()
