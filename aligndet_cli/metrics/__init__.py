"""Metrics of detections: COCO's by pycocotools, and Pascal VOC's."""
