"""Datasets: COCO, Pascal VOC, YOLO and the built-in digits become one kind of record, sample and batch."""
