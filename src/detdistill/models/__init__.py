"""Detectors: the five steps, three families over any timm backbone, and their files."""

from __future__ import annotations

from detdistill.models.base import (
    Batch,
    DenseRaw,
    Detections,
    Detector,
    Preprocess,
    Pyramid,
    Raw,
    Target,
    TwoStageRaw,
)
from detdistill.models.build import build_model, load_teacher
from detdistill.models.checkpoints import load_model, save_model
from detdistill.models.faster_rcnn import FasterRCNN, faster_rcnn
from detdistill.models.fcos import FCOS, fcos
from detdistill.models.retinanet import RetinaNet, retinanet
from detdistill.models.torchvision_weights import load_torchvision
from detdistill.models.weights import LoadReport, load_weights, read_state_dict

__all__ = [
    "FCOS",
    "Batch",
    "DenseRaw",
    "Detections",
    "Detector",
    "FasterRCNN",
    "LoadReport",
    "Preprocess",
    "Pyramid",
    "Raw",
    "RetinaNet",
    "Target",
    "TwoStageRaw",
    "build_model",
    "faster_rcnn",
    "fcos",
    "load_model",
    "load_teacher",
    "load_torchvision",
    "load_weights",
    "read_state_dict",
    "retinanet",
    "save_model",
]
