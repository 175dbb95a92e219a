"""YOLOv5: network definition, safe loading, images and boxes."""
