"""YOLOv5 and YOLOv7: network definition, safe loading of checkpoints, lowering to the graph, boxes."""
