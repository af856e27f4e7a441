"""Writes ``mmdet_detections.json``: what MMDetection itself detects with the models of ``mmdet_models.py``.

Not a test, and not needed to run the tests. It ran with mmdet 3.3.0, mmengine 0.10.7, mmcv-lite 2.1.0 (with
torchvision's RoIAlign, suppression and deformable convolution for mmcv's) and torch 2.14::

    python tests/models/mmdet_oracle.py
"""

from __future__ import annotations

import json
from pathlib import Path

import mmdet.models  # noqa: F401  registers
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmdet_models import CASES, case_entries, config, lively, picture
from mmengine.config import ConfigDict


def detect(case: str) -> dict[str, list]:
    model = MODELS.build(ConfigDict(config(case) | {"train_cfg": None})).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == case_entries(case), shapes.items() ^ case_entries(case).items()
    model.load_state_dict(lively(shapes, "caffe" in case))
    image = picture()
    size = tuple(image.shape[1:])
    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
    data = model.data_preprocessor({"inputs": [image.flip(0)], "data_samples": [sample]})  # it reads BGR
    with torch.no_grad():
        found = model.predict(data["inputs"], data["data_samples"])[0].pred_instances[:30]
    result = {name: found[name].tolist() for name in ("labels",)}
    result["boxes"] = [[round(x, 3) for x in box] for box in found.bboxes.tolist()]
    result["scores"] = [round(x, 6) for x in found.scores.tolist()]
    if "masks" in found:
        result["mask_areas"] = found.masks.flatten(1).sum(1).tolist()
    return result


if __name__ == "__main__":
    register_all_modules()
    everything = {case: detect(case) for case in CASES}
    lines = [f"{json.dumps(case)}: {json.dumps(found)}" for case, found in everything.items()]
    Path(__file__).with_name("mmdet_detections.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for case, found in everything.items():
        print(
            case, len(found["scores"]), found["scores"][:3], found["scores"][-1:], sorted(set(found["labels"]))
        )
