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
from detdistill.models.cascade_rcnn import CascadeMaskRCNN, CascadeRCNN, cascade_mask_rcnn, cascade_rcnn
from detdistill.models.checkpoints import load_model, save_model
from detdistill.models.detr import DETR
from detdistill.models.detr_families import d_fine, rtdetr_v2
from detdistill.models.faster_rcnn import FasterRCNN, faster_rcnn
from detdistill.models.fcos import FCOS, fcos
from detdistill.models.gfl import GFL, gfl
from detdistill.models.mask_rcnn import MaskRCNN, mask_rcnn
from detdistill.models.mmdet_weights import import_mmdet
from detdistill.models.reppoints import RepPoints, reppoints
from detdistill.models.retinanet import RetinaNet, retinanet
from detdistill.models.segmentation import EncoderDecoder, deeplabv3, pspnet
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
    "cascade_mask_rcnn",
    "cascade_rcnn",
    "d_fine",
    "deeplabv3",
    "faster_rcnn",
    "fcos",
    "gfl",
    "import_mmdet",
    "load_model",
    "load_teacher",
    "load_torchvision",
    "load_weights",
    "mask_rcnn",
    "pspnet",
    "read_state_dict",
    "reppoints",
    "retinanet",
    "rtdetr_v2",
    "save_model",
    "wrap",
]
