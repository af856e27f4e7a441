"""Detectors: the five steps, families over any timm backbone, adapters for others' models, and files."""

from __future__ import annotations

from detdistill.models.base import (
    Batch,
    DenseOutputs,
    Detections,
    Detector,
    HeadOutputs,
    Model,
    Preprocess,
    Pyramid,
    QueryOutputs,
    SegmentationOutputs,
    Segmenter,
    Target,
    TwoStageOutputs,
)
from detdistill.models.build import build_model, load_teacher
from detdistill.models.checkpoints.io import load_model, save_model
from detdistill.models.checkpoints.mmdet import import_mmdet
from detdistill.models.checkpoints.torchvision import load_torchvision
from detdistill.models.checkpoints.weights import LoadReport, load_weights, read_state_dict
from detdistill.models.families.cascade_rcnn import CascadeMaskRCNN, CascadeRCNN
from detdistill.models.families.detr import DETR
from detdistill.models.families.faster_rcnn import FasterRCNN
from detdistill.models.families.fcos import FCOS
from detdistill.models.families.gfl import GFL
from detdistill.models.families.mask_rcnn import MaskRCNN
from detdistill.models.families.reppoints import RepPoints
from detdistill.models.families.retinanet import RetinaNet
from detdistill.models.families.segmentation import EncoderDecoder
from detdistill.models.third_party.wrap import wrap

__all__ = [
    "DETR",
    "FCOS",
    "GFL",
    "Batch",
    "CascadeMaskRCNN",
    "CascadeRCNN",
    "DenseOutputs",
    "Detections",
    "Detector",
    "EncoderDecoder",
    "FasterRCNN",
    "HeadOutputs",
    "LoadReport",
    "MaskRCNN",
    "Model",
    "Preprocess",
    "Pyramid",
    "QueryOutputs",
    "RepPoints",
    "RetinaNet",
    "SegmentationOutputs",
    "Segmenter",
    "Target",
    "TwoStageOutputs",
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
