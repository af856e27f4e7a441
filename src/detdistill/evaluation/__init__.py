"""How good and how fast a detector is: COCO AP, VOC AP, parameters, FLOPs and images per second."""
