"""Detectors: the five steps, families over any timm backbone, adapters for others' models, and files."""

from __future__ import annotations

from detdistill.models.base import (
    Batch,
    DenseRaw,
    Detections,
    Detector,
    Model,
    Preprocess,
    Pyramid,
    QueryRaw,
    Raw,
    SegmentationRaw,
    Segmenter,
    Target,
    TwoStageRaw,
)
from detdistill.models.build import build_model, load_teacher
from detdistill.models.cascade_rcnn import CascadeMaskRCNN, CascadeRCNN
from detdistill.models.checkpoints import load_model, save_model
from detdistill.models.detr import DETR
from detdistill.models.faster_rcnn import FasterRCNN
from detdistill.models.fcos import FCOS
from detdistill.models.gfl import GFL
from detdistill.models.mask_rcnn import MaskRCNN
from detdistill.models.mmdet_weights import import_mmdet
from detdistill.models.reppoints import RepPoints
from detdistill.models.retinanet import RetinaNet
from detdistill.models.segmentation import EncoderDecoder
from detdistill.models.torchvision_weights import load_torchvision
from detdistill.models.weights import LoadReport, load_weights, read_state_dict
from detdistill.models.wrapped import wrap

__all__ = [
    "DETR",
    "FCOS",
    "GFL",
    "Batch",
    "CascadeMaskRCNN",
    "CascadeRCNN",
    "DenseRaw",
    "Detections",
    "Detector",
    "EncoderDecoder",
    "FasterRCNN",
    "LoadReport",
    "MaskRCNN",
    "Model",
    "Preprocess",
    "Pyramid",
    "QueryRaw",
    "Raw",
    "RepPoints",
    "RetinaNet",
    "SegmentationRaw",
    "Segmenter",
    "Target",
    "TwoStageRaw",
    "build_model",
    "import_mmdet",
    "load_model",
    "load_teacher",
    "load_torchvision",
    "load_weights",
    "read_state_dict",
    "save_model",
    "wrap",
]
