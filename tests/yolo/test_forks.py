"""Networks of forks, of other YOLOs and of other libraries: named by their classes' names, with the way through."""

from __future__ import annotations

import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from archived import edited
from test_filekinds import again, refused, saved, usual  # noqa: F401 (a fixture)
from torch import nn

from dsconvert.base.errors import InputError
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.families import hostile, usual_name

FORKS = {
    "models.common.StemBlock": "yolov5-face", "models.common.Shuffle_Block": "YOLOv5-Lite",
    "models.common.LC_Block": "YOLOv5-Lite", "models.yolo.ClassificationModel": "YOLOv5 classification",
    "models.yolo.IKeypoint": "YOLOv7 pose", "models.yolo.IAuxDetect": "auxiliary heads",
    "models.yolo.DualDDetect": "YOLOv9", "models.common.RepNCSPELAN4": "YOLOv9", "models.models.Darknet": "YOLOR",
    "models.common.BottleneckCSP2": "Scaled-YOLOv4", "models.common.BottleneckCSP": "YOLOv5 v3.1 or older",
    "utils.activations.Hardswish": "YOLOv5 v3.1 or older", "yolov6.models.yolo.Model": "YOLOv6",
    "yolox.models.yolox.YOLOX": "YOLOX", "torch.nn.modules.padding.ZeroPad2d": "YOLOv3-tiny",
    "mmdet.models.detectors.yolox.YOLOX": "OpenMMLab", "detectron2.modeling.rcnn.GeneralizedRCNN": "Detectron2",
    "super_gradients.training.models.YoloNAS": "YOLO-NAS", "models.common.C3STR": "C3STR, a layer that YOLOv5",
    "models.common.CoordAtt": "CoordAtt, a layer that YOLOv5", "models.bifpn.BiFPN_Add2": "BiFPN_Add2, a layer that",
    "models.yolo.Decoupled_Detect": "decoupled head", "models.common.CBAM": "attention",
    "models.common.AutoShape": "wrapped for inference", "torchvision.models.resnet.ResNet": "torchvision",
    "my_program.nets.Detector": "my_program.nets.Detector", "utils.loss.ComputeLoss": "utils.loss.ComputeLoss",
    "torch.nn.modules.rnn.GRU": "torch.nn.modules.rnn.GRU", "easydict.EasyDict": "easydict.EasyDict",
    "ultralytics.nn.tasks.DetectionModel": "ultralytics package",
    "nanodet.model.arch.nanodet_plus.NanoDetPlus": "NanoDet",
}  # fmt: skip
ULTRALYTICS = {
    ("nn.modules.block.C2f", "nn.modules.head.Detect"): "YOLOv8, detection",
    ("nn.modules.block.C3", "nn.modules.head.Detect"): "yolov5u or YOLOv3u, detection",
    ("nn.modules.block.C3k2", "nn.modules.block.C2f", "nn.modules.head.Detect"): "YOLO11 or YOLO26, detection",
    ("nn.modules.block.C3k2", "nn.modules.head.Pose26"): "YOLO26, pose",
    ("nn.modules.block.C3k2", "nn.modules.head.OBB26"): "YOLO26, oriented boxes",
    ("nn.modules.block.C3k2", "nn.modules.block.A2C2f"): "YOLO12",
    ("nn.modules.head.v10Detect", "nn.modules.block.C2f"): "YOLOv10",
    ("nn.modules.head.Pose", "nn.modules.block.C2f"): "YOLOv8, pose",
    ("nn.modules.head.OBB", "nn.modules.block.C2f"): "YOLOv8, oriented boxes",
    ("nn.modules.head.Classify", "nn.modules.block.C2f"): "YOLOv8, classification",
}  # fmt: skip


def asking(names: list[str], path: Path) -> Path:
    """A checkpoint whose pickle asks for these classes, one after the other."""
    parts = [name.rpartition(".") for name in names]
    content = b"".join(f"c{home}\n{last}\n".encode() for home, _, last in parts)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02(" + content + b"t.")
        archive.writestr("x/byteorder", "little")
    return path


def made(name: str) -> bytes:
    """A checkpoint whose model is an object of a class of that name."""
    home, _, last = name.rpartition(".")
    parents = [".".join(home.split(".")[:i]) for i in range(1, home.count(".") + 2)]
    before = {p: sys.modules.get(p) for p in parents}
    sys.modules.update({p: types.ModuleType(p) for p in parents})
    try:
        kind = type(last, (nn.Module,), {"__module__": home})
        setattr(sys.modules[home], last, kind)
        return saved({"epoch": 1, "model": nn.Sequential(kind()), "ema": None})
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.parametrize("name", FORKS)
def test_an_ordinary_fork_is_named_and_shown_the_way(tmp_path, call, name):
    torchs = {"torch.nn.modules.rnn.GRU": nn.GRU(2, 2), "torch.nn.modules.padding.ZeroPad2d": nn.ZeroPad2d(1)}
    (tmp_path / "best.pt").write_bytes(saved({"model": torchs[name]}) if name in torchs else made(name))
    said = refused(call("quantize", "best.pt", cwd=tmp_path), "best.pt")
    assert FORKS[name] in said
    assert re.search(r"ONNX.*then dsconvert quantize \w+\.onnx --calib", said)
    assert "not allow" not in said
    assert refused(call("info", "best.pt", cwd=tmp_path), "best.pt") == said


@pytest.mark.parametrize("names", ULTRALYTICS, ids=ULTRALYTICS.values())
def test_the_generation_and_task_of_ultralytics_checkpoints(tmp_path, names):
    plain = ["collections.OrderedDict", "torch.nn.modules.conv.Conv2d", "pathlib.PosixPath", "datetime.timezone"]
    path = asking([*plain, *(f"ultralytics.{n}" for n in names), "types.SimpleNamespace"], tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"ultralytics.*: {ULTRALYTICS[names]}.*yolo export.*dsconvert quantize"):
        load_checkpoint(path)


HOSTILE = (
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "__builtin__.exec",
    "builtins.getattr", "runpy.run_path", "importlib.import_module", "shutil.rmtree", "pickle.loads",
    "torch.load", "torch.hub.load",
    "torch.jit.load", "torch.storage._load_from_bytes", "torch.fx.graph_module.reduce_graph_module", "numpy.load",
    "numpy.testing._private.utils.runstring", "models.common.Conv.forward", "models.yolo.DetectionModel.__init__",
    "ultralytics.nn.tasks.DetectionModel.__globals__", "pathlib.Path.write_text", "OS.system", "ctypes.CDLL",
    "joblib.load", "webbrowser.open", "socket.create_connection", "functools.partial", "operator.attrgetter",
    "collections.OrderedDict.__init__",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "beside", ["models.common.Conv", "models.common.StemBlock", "ultralytics.nn.tasks.DetectionModel"]
)
def test_code_is_refused_as_code_even_in_a_forks_file(tmp_path, name, beside):
    path = asking([beside, name], tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"asks for {re.escape(name)}, which dsconvert does not allow, so nothing"):
        load_checkpoint(path)


def test_no_fork_and_no_plain_data_counts_as_code():
    plain = ["torch.optim.sgd.SGD", "torch.cuda.amp.grad_scaler.GradScaler", "numpy.random.mtrand.RandomState",
             "torch.ao.nn.quantized.modules.conv.Conv2d", "decimal.Decimal", "torch.nn.modules.rnn.GRU"]  # fmt: skip
    assert not [n for n in (*FORKS, *plain) if hostile(n)]
    assert [n for n in HOSTILE if not hostile(n)] == []


def test_only_a_trees_own_names_are_shortened():
    assert usual_name("yolov5.models.yolo.Model") == "models.yolo.Model"
    assert usual_name("src.third.models.common.Conv") == "models.common.Conv"
    for name in ("yolov6.models.yolo.Model", "ultralytics.models.yolo.Model", "yolov5.utils.general.check", "models.x",
                 "torch.nn.modules.conv.Conv2d", "lib.models.common.Conv"):  # fmt: skip
        assert usual_name(name) == name


@pytest.mark.parametrize(
    ("more", "words"),
    [(10, "five key points, as yolov5-face"), (180, "oriented boxes"), (51, "pose"), (8, "numbers a box")],
)
def test_a_head_with_more_numbers_a_box_is_a_forks(usual, tmp_path, more, words):  # noqa: F811
    def change(content):
        content["model"].model[-1].no = content["model"].model[-1].nc + 5 + more
        return content

    (tmp_path / "x.pt").write_bytes(again(usual, change))
    with pytest.raises(InputError, match=f"fork of YOLOv5.*{words}.*dsconvert quantize"):
        load_checkpoint(tmp_path / "x.pt")


def test_layers_that_differ_under_their_usual_names_point_to_onnx(usual, tmp_path):  # noqa: F811
    (tmp_path / "x.pt").write_bytes(edited(usual, b"running_mean", b"running_mien"))
    with pytest.raises(InputError, match=r"does not match its own model yaml.*fork.*dsconvert quantize"):
        load_checkpoint(tmp_path / "x.pt")


def test_parts_of_training_on_several_gpus_are_named(tmp_path):
    names = ["torch.nn.parallel.distributed.DistributedDataParallel", "torch.distributed.distributed_c10d.Store"]
    with pytest.raises(InputError, match=r"several GPUs.*torch.save\(\{'model': model.module\}"):
        load_checkpoint(asking(names, tmp_path / "x.pt"))


WEIGHTS = {
    "backbone.backbone.stem.conv.conv.weight": ("YOLOX", "--input yolox"),
    "module.head.obj_preds.0.weight": ("YOLOX", "--input yolox"),
    "model.head.gfl_cls.0.weight": ("NanoDet", "--input nanodet"),
    "detect_head.obj_layers.conv5x5.0.weight": ("FastestDet", "--input fastestdet"),
    "backbone.ERBlock_2.0.rbr_dense.conv.weight": ("YOLOv6", "dsconvert quantize"),
    "module_list.0.Conv2d.weight": ("Darknet network", "dsconvert quantize"),
    "model.22.cv2.0.0.conv.weight": ("ultralytics", "dsconvert quantize"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_weights_without_their_network_are_named(tmp_path, name, key):
    weights = {"a.weight": torch.zeros(1), name: torch.zeros(1)}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"export it to ONNX with the program that made it, then dsconvert") as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert all(words in str(caught.value) for words in WEIGHTS[name])


@pytest.mark.parametrize(("name", "option"), [("models.common.Shuffle_Block", "v5lite"), ("yolox.models.X", "yolox")])
def test_the_way_names_the_input_of_a_family(tmp_path, name, option):
    with pytest.raises(InputError, match=rf"dsconvert quantize model\.onnx --calib photos/ --input {option}\.$"):
        load_checkpoint(asking([name], tmp_path / "x.pt"))


def test_no_sentence_shows_names_of_ours(tmp_path):
    """What a stranger's file puts in a number's place is not called by the name of our stand-in."""
    torch.save({"model": torch.device("cpu"), "ema": None}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no model") as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "Record" not in str(caught.value)
