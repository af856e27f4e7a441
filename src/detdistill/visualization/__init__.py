"""Pictures as PNG: training curves and detections on images."""
