"""A job's masks as files: COCO, YOLO, PNG, Label Studio, the summary."""
