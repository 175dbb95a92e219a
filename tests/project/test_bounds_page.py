"""What the pages about security and reliability say is bounded: by the numbers that the code has."""

from __future__ import annotations

import math
import os
import re

import pytest
from conftest import ROOT

from dsconvert.base import smallyaml, workers
from dsconvert.model import file as modelfile
from dsconvert.onnxfile import bounds, engines, inspect, wire
from dsconvert.photos import dataset, images, labels, photobounds, tifflist
from dsconvert.report import gather
from dsconvert.scoring import candidates, metadata, rawcompare, video
from dsconvert.yolo import archive, container, picklestack


@pytest.mark.parametrize(
    ("page", "pattern", "value"),
    [
        ("reliability.md", r"file gain (\d+) MB", bounds.BASE_BYTES // 1_000_000),
        ("reliability.md", r"(\d+) MB for each CPU", bounds.THREAD_BYTES >> 20),
        ("reliability.md", r"once may take (\d+) s, plus a second", bounds.BASE_SECONDS),
        ("security.md", r"pickle \| (\d+) MiB; tuples", container.MAX_PICKLE_BYTES >> 20),
        ("security.md", r"; tuples (\d+) deep", picklestack.MAX_TUPLES),
        ("security.md", r"deep and of ([\d,]+) leaves", picklestack.MAX_LEAVES),
        ("security.md", r"numbers within 2\^(\d+), nothing", math.log2(picklestack.MAX_KEY)),
        ("security.md", r"tuples of up to (\d+) of these", picklestack.MAX_KEY_PARTS),
        ("security.md", r"stored tensor \| (\d+);", archive.MAX_DIMS),
        ("security.md", r"their product 2\^(\d+)", math.log2(archive.MAX_COUNT)),
        ("security.md", r"2 GB, ([\d,]+) parts", wire.MOST_PARTS),
        ("security.md", r"pixel; ([\d,]+) numbers where `compare`", rawcompare.MOST_NUMBERS),
        ("security.md", r"parts \(fields of its protobuf\), ([\d,]+) nodes", wire.MOST_NODES),
        ("security.md", r"graphs (\d+) deep", wire.MOST_DEPTH // 3),  # a graph is in an attribute of a node of a graph
        ("security.md", r"with `--imgsz` (\d+)x", engines.MAX_SIDE),
        ("security.md", r"as the image has pixels; ([\d,]+) classes", metadata.MAX_CLASSES),
        ("security.md", r"half the height and width, (\d+) numbers a pixel", candidates.MAX_PROTOTYPES),
        ("security.md", r"metadata \| ([\d,]+) characters", metadata.MAX_NAMES),
        ("security.md", r"suppression (\d+) characters", metadata.MAX_NMS),
        ("security.md", r"weights' sources \| ([\d,]+)", inspect.MOST_STEPS),
        ("security.md", r"model file \| (\d+) MiB of table", modelfile.MAX_TABLE >> 20),
        ("security.md", r"of table, (\d+) MiB of it JSON", modelfile.MAX_HEADER >> 20),
        ("security.md", r"JSON; 2\^(\d+) weights a layer", math.log2(modelfile.MAX_LAYER)),
        ("security.md", r"a layer, 2\^(\d+) in all", math.log2(modelfile.MAX_WEIGHTS)),
        ("security.md", r"within a TIFF \| (\d+) scans", photobounds.MOST_SCANS),
        ("security.md", r"any image \| (\d+) million pixels", video.MAX_PIXELS // 1_000_000),
        ("security.md", r"up to five times as much, (\d+) million", photobounds.MOST_WIDE // 1_000_000),
        ("security.md", r"tiles of a TIFF \| ([\d,]+);", tifflist.MOST_PIECES),
        ("security.md", r"file's bytes and (\d+) MiB, counted as often as they", photobounds.SHARED_PIECES >> 20),
        ("security.md", r"file's bytes and (\d+) MiB, counted as often as it", photobounds.SHARED_VALUES >> 20),
        ("security.md", r"is named; ([\d,]+) entries", photobounds.MOST_ENTRIES),
        ("security.md", r"quantize.json, for a report \| (\d+) MiB", gather.MOST_BYTES >> 20),
        ("security.md", r"errors beyond ([\d,]+) dB", gather.MOST_DB),
        ("security.md", r"looks beyond 10\^(\d+) are", math.log10(gather.MOST_LOSS)),
        ("security.md", r"labels .*?at most (\d+) MiB and", labels.MAX_LABEL_BYTES >> 20),
        ("security.md", r"MiB and ([\d,]+) rows a file", labels.MAX_LABEL_ROWS),
        ("security.md", r"line by line: at most (\d+) MiB", dataset.MAX_LIST_BYTES >> 20),
        ("security.md", r"MiB, ([\d,]+) lines of", dataset.MAX_LIST_LINES),
        ("security.md", r"lines of ([\d,]+) characters", dataset.MAX_LIST_LINE),
        ("security.md", r"characters, ([\d,]+) files that are gone", dataset.MOST_GONE),
        ("security.md", r"more than (\d+) million are refused", dataset.MOST_FILES // 1_000_000),
        ("security.md", r"at most (\d+) MiB, 50,000 parts", dataset.MAX_YAML_BYTES >> 20),
        ("security.md", r"MiB, ([\d,]+) parts and", smallyaml.MOST_PARTS),
        ("security.md", r"parts and (\d+) levels", smallyaml.MOST_DEPTH),
        ("security.md", r"recipes and `--cfg`: (\d+) kB", smallyaml.MOST_BYTES >> 10),
        ("security.md", r"photographs .*?at most (\d+) GiB; only", images.MAX_IMAGE_BYTES >> 30),
        ("security.md", r"134 million pixels, (\d+) MB when decoded", 3 * video.MAX_PIXELS / 1e6 // 100 * 100),
        ("security.md", r"in all of them \((\d+) scans", photobounds.MOST_SCANNED / video.MAX_PIXELS),
        ("security.md", r"or is silent for (\d+) s", workers.PATIENCE),
    ],
)
def test_a_bound_is_the_codes(page, pattern, value):
    found = re.search(pattern, " ".join((ROOT / "docs" / page).read_text().split()))
    assert found, pattern
    assert float(found[1].replace(",", "")) == value


def test_images_are_bounded_as_the_page_says():
    """OpenCV is told by the environment, unless it says something already."""
    assert int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]) == video.MAX_PIXELS == 1 << 27
