"""Tell whose checkpoint a file is by the names of classes in its pickle; none of them is ever looked up or run.

There are three answers. Names that could run code are refused as such. A fork, another YOLO or another library's
network is named, with the way to convert it. Anything else is some program's own class.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import EXPORTED

READS = "dsconvert reads detection checkpoints of YOLOv5 and YOLOv7, and segmentation checkpoints of YOLOv5"
WAY = EXPORTED
ULTRALYTICS_WAY = "yolo export model=best.pt format=onnx, then dsconvert quantize best.onnx --calib photos/"

# the first pattern that a name matches tells what the file is, so more special ones come first
_ULTRALYTICS = (
    (r"ultralytics\.nn\.modules\.head\.(v10Detect)", "YOLOv10"),
    (r"ultralytics\.nn\.modules\.head\.(RTDETRDecoder)", "RT-DETR"),
    (r"ultralytics\.nn\.modules\.head\.(WorldDetect|YOLOEDetect|YOLOESegment)", "YOLO-World or YOLOE"),
    (r"ultralytics\.nn\.modules\.block\.(A2C2f)", "YOLO12"),
    (r"ultralytics\.nn\.modules\.head\.[A-Za-z]+26$", "YOLO26"),
    (r"ultralytics\.nn\.modules\.block\.(C3k2|C2PSA)", "YOLO11 or YOLO26"),
    (r"ultralytics\.nn\.modules\.block\.(RepNCSPELAN4|ADown|ELAN1|AConv)", "YOLOv9"),
    (r"ultralytics\.nn\.modules\.block\.(C2f|C2)", "YOLOv8"),
    (r"ultralytics\.nn\.modules\.block\.C3", "yolov5u or YOLOv3u"),
)
_TASKS = (
    (r"ultralytics\.nn\.(tasks|modules\.head)\.(Classification|Classify)", "classification"),
    (r"ultralytics\.nn\.(tasks|modules\.head)\.(Segment)", "segmentation"),
    (r"ultralytics\.nn\.(tasks|modules\.head)\.(Pose)", "pose"),
    (r"ultralytics\.nn\.(tasks|modules\.head)\.(OBB)", "oriented boxes"),
)
_FAMILIES = (
    (r"models\.yolo\.ClassificationModel|models\.common\.Classify", "a YOLOv5 classification checkpoint"),
    (r"models\.yolo\.IAuxDetect", "a YOLOv7 checkpoint with auxiliary heads (W6, E6, D6)"),
    (r"models\.yolo\.IKeypoint", "a YOLOv7 pose checkpoint"),
    (r"models\.yolo\.(ISegment|IRSegment|MT|IBin)|models\.common\.(Merge|Refine|ROIPooler)",
     "a YOLOv7 checkpoint with masks or another head"),
    (r"models\.yolo\.(DDetect|DualDetect|DualDDetect|TripleDetect|TripleDDetect)|"
     r"models\.common\.(RepNCSPELAN4|SPPELAN|ADown|CBLinear|CBFuse)", "a YOLOv9 checkpoint"),
    (r"models\.experimental\.Ensemble", "an ensemble of models"),
    (r"models\.common\.(AutoShape|DetectMultiBackend)",
     "a network wrapped for inference (AutoShape, as torch.hub gives it), not what training saved"),
    (r"models\.common\.(StemBlock|ShuffleV2Block|BlazeBlock|DoubleBlazeBlock|SimpleBlock)", "a yolov5-face checkpoint"),
    (r"models\.common\.(Shuffle_Block|conv_bn_relu_maxpool|CBRM|DWConvblock|LC_Block|LC_SEModule|ES_Bottleneck|"
     r"ES_SEModule|mobilev3_bneck|RepVGGBlock|CBH|Hsigmoid|ADD|DepthSepConv)", "a YOLOv5-Lite checkpoint"),
    (r"models\.common\.(BottleneckCSP2|BottleneckCSPF|VoVCSP|SPPCSP|CSPF)|mish_cuda\.", "a Scaled-YOLOv4 checkpoint"),
    (r"models\.models\.(Darknet|YOLOLayer|JDELayer)|models\.(Darknet|YOLOLayer)$", 
     "a YOLOv3, YOLOv4 or YOLOR checkpoint"),
    (r"models\.yolo\.(Keypoint|Pose|KeypointDetect)", "a YOLOv5 pose checkpoint"),
    (r"models\.yolo\.(OBB|RotatedDetect|DetectOBB)", "a checkpoint of YOLOv5 for oriented boxes"),
    (r"models\.yolo\.(Decoupled_Detect|ASFF_Detect|DecoupledDetect)|models\.common\.DecoupledHead",
     "a fork of YOLOv5 with a decoupled head"),
    (r"models\.common\.CBAM", "a fork of YOLOv5 with attention (CBAM)"),
    (r"models\.common\.BottleneckCSP|utils\.activations\.", "a checkpoint of YOLOv5 v3.1 or older, or of a fork of it"),
    (r"torch\.nn\.modules\.padding\.ZeroPad2d", "a YOLOv3-tiny checkpoint"),
    (r"yolov6\.", "a YOLOv6 checkpoint"),
    (r"gold_yolo\.", "a Gold-YOLO checkpoint"),
    (r"yolox\.", "a YOLOX checkpoint"),
    (r"nanodet\.", "a NanoDet checkpoint"),
    (r"damo\.", "a DAMO-YOLO checkpoint"),
    (r"super_gradients\.", "a checkpoint of SuperGradients (YOLO-NAS)"),
    (r"lib\.models\.", "a YOLOP or HybridNets checkpoint"),
    (r"mmyolo\.|mmdet\.|mmengine\.|mmcv\.", "a checkpoint of OpenMMLab (MMDetection, MMYOLO)"),
    (r"detectron2\.", "a checkpoint of Detectron2"),
    (r"torchvision\.", "a network of torchvision"),
    (r"timm\.", "a network of timm"),
    (r"transformers\.", "a network of Hugging Face's transformers"),
    (r"effdet\.", "an EfficientDet checkpoint"),
    (r"rfdetr\.|models\.lwdetr\.", "an RF-DETR checkpoint"),
    (r"pytorch_lightning\.|lightning\.", "a checkpoint of PyTorch Lightning"),
    (r"fastai\.", "a checkpoint of fastai"),
)  # fmt: skip

# names of tensors in state dicts, which some families hand out instead of a network
_STATE_DICTS = (
    (r"(module\.)?(backbone\.backbone\.(stem|dark\d)\.|head\.(cls|reg|obj)_preds\.)", "a YOLOX network"),
    (r"(module\.|model\.|avg_model\.)*head\.gfl_cls\.", "a NanoDet network"),
    (r"(module\.)?detect_head\.(obj|reg|cls)_layers\.", "a FastestDet network"),
    (r"(module\.)?backbone\.ERBlock_\d", "a YOLOv6 network"),
    (r"(module\.)?(module_list|models)\.\d+\.", "a Darknet network (YOLOv3, YOLOv4)"),
    (
        r"(module\.|model\.)*\d+\.cv[23]\.\d+\.\d+\.(conv\.)?weight",
        "a network of the ultralytics package (YOLOv8 or later)",
    ),
)
# families with another input or output than YOLOv5's, and their name for --input
_INPUTS = {
    "a YOLOv5-Lite checkpoint": "v5lite", "a YOLOX checkpoint": "yolox", "a YOLOX network": "yolox",
    "a NanoDet checkpoint": "nanodet", "a NanoDet network": "nanodet", "a FastestDet network": "fastestdet",
}  # fmt: skip

# data that programs store beside a network, and torch's own objects: unknown here, but not an attack
_PLAIN = re.compile(
    r"(collections\.(defaultdict|deque|Counter)|datetime\.\w+|pathlib(\._local)?\.\w*Path|argparse\.\w+|decimal\.Decimal|"
    r"uuid\.UUID|types\.SimpleNamespace|fractions\.Fraction|copy_?reg\._reconstructor|logging\.\w*Logger|"
    r"(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|bool|complex|str|bytes|bytearray|object|slice|"
    r"range|type)|torch\.(nn|optim|cuda\.amp|amp|ao|quantization|distributed|_dynamo)\.[\w.]*[A-Z]\w*|torch\.\w+Storage|torch\.Size|torch\.device|"
    r"torch\.Generator|torch\.(b?float|u?int|complex)\d+|torch\.(bool|half|double|long|strided|contiguous_format)|"
    r"torch\._utils\._rebuild_\w+|torch\.(nn\.modules\.\w+|nn\.parallel\.\w+)\.[A-Z]\w*|torch\._tensor\.\w+|"
    r"torch\.serialization\._get_layout|numpy\.(random\.[\w.]+|dtype|ndarray|dtypes\.\w+|float\d+|int\d+|bool_?)|"
    r"numpy\._?core\.multiarray\.\w+)"
)
_BEFORE = re.compile(r"(?:[A-Za-z_]\w*\.){1,4}(models\.(?:yolo|common|experimental)\.[A-Za-z]\w*)")
_CLASS = re.compile(r"([A-Za-z_]\w*\.)+[A-Za-z]\w*")
_OWN_LAYER = re.compile(r"models\.(\w+\.)*([A-Za-z]\w*)")
_WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")


def refuse_names(asked: Sequence[str], unknown: Sequence[str], path: Path) -> None:
    """Raise InputError, saying whose file it is, if it holds unknown names.

    asked: all names in the file.
    unknown: the names that no YOLOv5 or YOLOv7 network has.
    """
    for name in unknown:
        if hostile(name):
            raise InputError(f"{path} asks for {name[:80]}, which dsconvert does not allow, so nothing was loaded.")
    if any(name.startswith("__torch__.") for name in asked):
        raise InputError(f"{path} is a TorchScript export; dsconvert needs the training checkpoint (.pt).")
    ultralytics = _first(_ULTRALYTICS, asked)
    if any(name.startswith("ultralytics.") for name in unknown):
        which = f"{ultralytics}, " if ultralytics else ""
        task = _first(_TASKS, asked)
        raise InputError(
            f"{path} is a checkpoint of the ultralytics package (YOLOv8 or later){': ' if which or task else ''}"
            f"{which}{task or ('detection' if which else '')}; {READS}; the way through is an ONNX file: "
            f"{ULTRALYTICS_WAY}."
        )
    if family := _first(_FAMILIES, unknown):
        some = next(name for name in unknown if any(re.match(p, name) for p, f in _FAMILIES if f == family))
        raise InputError(f"{path} is {family}, by {some[:80]}; {READS}; {_way(family)}.")
    for name in unknown:
        if layer := _OWN_LAYER.fullmatch(name):
            raise InputError(
                f"{path} is a fork of YOLOv5 with {layer[2][:80]}, a layer that YOLOv5 and YOLOv7 do not have; {WAY}."
            )
    if unknown and any(name in _WRAPPERS for name in asked):
        raise InputError(
            f"{path} is a network wrapped for several GPUs, with parts of its training ({unknown[0][:80]}) in it; save "
            "torch.save({'model': model.module}, 'best.pt') instead."
        )
    for name in unknown:
        if name.startswith("torch.nn."):
            raise InputError(
                f"{path} holds a layer that YOLOv5 and YOLOv7 do not have, {name[:80]}, so it is another network or a "
                f"fork; {WAY}."
            )
        raise InputError(
            f"{path} holds an object of another program ({name[:80]}), which dsconvert does not know, so nothing was "
            f"loaded; save the network alone with torch.save({{'model': model}}, 'best.pt'), or {WAY}."
        )


def refuse_state_dict(names: Sequence[str], path: Path) -> None:
    """Raise InputError, saying whose network it is, if the names of tensors belong to a known family."""
    if family := _first(_STATE_DICTS, names):
        raise InputError(
            f"{path} holds the weights of {family}, a state dict without the network itself; {READS}; {_way(family)}."
        )


def _way(family: str) -> str:
    """Return how a family's network can be converted."""
    return f"{WAY} --input {_INPUTS[family]}" if family in _INPUTS else WAY


def usual_name(name: str) -> str:
    """Return the name of a class in YOLOv5's own tree; packages of it put theirs before, as in
    yolov5.models.yolo.Model.
    """
    found = _BEFORE.fullmatch(name)
    known = found is None or name.startswith("ultralytics.") or any(re.match(p, name) for p, _ in _FAMILIES)
    return name if found is None or known else found[1]


def hostile(name: str) -> bool:
    """Return whether a name is one that no checkpoint needs.

    These are the interpreter's own functions, functions of torch and NumPy that read or run something, methods, and
    anything that is not a name.
    """
    if _PLAIN.fullmatch(name):
        return False
    if not _CLASS.fullmatch(name) or "__" in name.removeprefix("__torch__"):
        return True
    top, last = name.split(".")[0], name.rsplit(".")[-1]
    if top.lower() in _INTERPRETER or top in ("torch", "numpy", "_codecs"):
        return True
    classes = [part for part in name.split(".")[:-1] if part[0].isupper()]
    return bool(classes) and not last[0].isupper()  # a class's method


_INTERPRETER = {*sys.stdlib_module_names, "__builtin__", "nt", "ce", "commands", "cpickle", "cloudpickle", "dill",
                "joblib", "pip", "setuptools", "pkg_resources", "distutils", "os2", "riscos"}  # fmt: skip


def _first(patterns: Iterable[tuple[str, str]], names: Sequence[str]) -> str | None:
    return next((what for pattern, what in patterns if any(re.match(pattern, name) for name in names)), None)
