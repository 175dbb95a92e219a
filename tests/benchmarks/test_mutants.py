"""What mutants of the code that guards showed to be untested: each test here fails for one of them."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, randomise
from formats import fit_weight, free
from onnx import TensorProto, helper, numpy_helper
from pt_writer import yolov5_bytes

from dsconvert.base.errors import InputError
from dsconvert.fit import draws
from dsconvert.fit.layer import fit_cds
from dsconvert.fit.lockstep import _Side
from dsconvert.fit.moments import TOGETHER, measure_moments
from dsconvert.fit.seen import Seen, seen_evenly
from dsconvert.graph.ir import INPUT, Node
from dsconvert.measure.clipping import LEVELS
from dsconvert.measure.grids import IMAGE_GRID, best_range
from dsconvert.measure.leftover import left_by
from dsconvert.onnxfile import bounds
from dsconvert.onnxfile.external import check_external_data
from dsconvert.widths import allocate as module
from dsconvert.widths.allocate import Choice, allocate
from dsconvert.yolo import checkpoint
from dsconvert.yolo.archive import ALLOWED, TENSOR, Archive
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.container import Storage
from dsconvert.yolo.network import Network, head_from_detect

# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", [0, 1])
def test_an_earlier_limit_of_the_users_is_kept(monkeypatch, whose):
    """`ulimit -d`, soft or hard: a bound may be below it, never above, and afterwards it is there again."""
    mine = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    mine[whose] = 512 << 20
    if whose:
        mine[0] = 512 << 20  # the soft one is never above the hard one
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(bounds.resource, "getrlimit", lambda kind: tuple(mine))
    monkeypatch.setattr(bounds.resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    with bounds.growth(1 << 50):
        assert set_to == [(512 << 20, mine[1])]
    assert set_to[1:] == [tuple(mine)]
    set_to.clear()
    with bounds.growth(0):
        assert 0 < set_to[0][0] < 1 << 45
    assert set_to[0][0] <= 512 << 20


@pytest.mark.parametrize(("changes", "warned"), [({}, 0), ({"resource": None}, 1), ({"_data_pages": lambda: -1}, 1)])
def test_a_system_that_bounds_no_memory_is_told_of_once_and_no_other(monkeypatch, changes, warned):
    """Each of the two that a bound needs may be missing."""
    for name, value in changes.items():
        monkeypatch.setattr(bounds, name, value)
    said: list[str] = []
    with bounds.enforced(said.append):
        for _ in range(2):
            assert bounds.Bounds("a", 0).first(lambda: 5) == 5
    assert len(said) == warned


# --- external data --------------------------------------------------------------------------------------------------


def outside() -> TensorProto:
    """A tensor whose numbers are in the folder above."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    return tensor


def holding(where: str) -> onnx.ModelProto:
    """A model with such a tensor in one place."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    plain = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([plain], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if where in ("initialization", "algorithm"):
        inner = helper.make_graph([plain], "t", ends[:1], ends[1:], [outside()])
        getattr(model.training_info.add(), where).CopyFrom(inner)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(4, np.float32)))
    attribute = constant.attribute[0]
    if where == "a function's attribute":
        attribute.t.CopyFrom(outside())
    elif where == "a function's list":
        attribute.type = onnx.AttributeProto.TENSORS
        attribute.ClearField("t")
        attribute.tensors.append(outside())
    elif where == "a function's sparse tensor":
        attribute.type = onnx.AttributeProto.SPARSE_TENSOR
        attribute.ClearField("t")
        attribute.sparse_tensor.values.CopyFrom(outside())
    elif where == "a graph in a function":
        attribute.type = onnx.AttributeProto.GRAPH
        attribute.ClearField("t")
        attribute.g.CopyFrom(helper.make_graph([plain], "i", ends[:1], ends[1:], [outside()]))
    if where.startswith(("a function", "a graph")):
        model.functions.append(helper.make_function("d", "F", ["x"], ["y"], [constant, plain], model.opset_import))
    return model


PLACES = ["initialization", "algorithm", "a function's attribute", "a function's list", "a function's sparse tensor",
          "a graph in a function"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_data_outside_are_found_in_training_graphs_and_functions(tmp_path, where):
    path = tmp_path / "m.onnx"
    path.write_bytes(holding(where).SerializeToString())
    with pytest.raises(InputError, match="outside of its own folder"):
        check_external_data(path)
    path.write_bytes(holding("nowhere").SerializeToString())
    assert check_external_data(path) == path.stat().st_size


# --- stored tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 1), ()])
def test_a_stride_for_each_dimension_and_no_more(stride):
    """However few the numbers are."""
    held = SimpleNamespace(numbers=lambda storage: bytes(16))
    record = ALLOWED[TENSOR](Storage("0", torch.float32, 4), 0, (4,), stride)
    with pytest.raises(InputError, match="declares larger weights"):
        Archive(Path("a.pt"), None, held, 16).tensor(record)


# --- widths ---------------------------------------------------------------------------------------------------------


def test_sizes_are_never_rounded_down(monkeypatch):
    """Units of 10 bytes: three layers of 14 bytes do not fit into 40, though three units of 10 would."""
    monkeypatch.setattr(module, "STATES", 4)
    large, small = Choice(free(4, 32), 14, 0.0), Choice(free(2, 32), 10, 1.0)
    options = {name: [large, small] for name in "abc"}
    chosen = allocate(options, 40)
    assert sum(c.size for c in chosen.values()) == 34
    assert sum(c.damage for c in chosen.values()) == 2
    with pytest.raises(ValueError, match="need at least"):
        allocate({name: [large] for name in "abc"}, 40)


# --- shifts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "moved"), [(0.45, False), (0.6, True), (1.9, True), (2.2, False), (9.0, False)])
def test_a_shift_moves_by_less_than_a_factor_of_two_either_way(slope, moved):
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    fitted = fit_weight(torch.ones(1, 1, 1, 1), 4, 1)
    x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    y = slope * float(fitted.weight()) * x
    result = fit_cds(node, fitted, seen_evenly(x, y, 0))
    wanted = fitted.cds_w * (slope if moved else 1)
    torch.testing.assert_close(result.weight.cds_w, wanted, rtol=1e-5, atol=0.0)  # float32 points on a line


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "each"), [(1, 256), (256, 256), (257, 255), (1000, 65), (4096, 16), (4097, 16), (10**6, 16)]
)
def test_many_images_give_fewer_positions_each(images, each):
    """65,536 in all, as far as 16 an image allow."""
    assert draws.positions_each(images) == each


def test_what_is_drawn_from_an_image_stays_what_kept_calibrations_hold():
    assert draws.of_image(2, 5).initial_seed() == 2_000_011


def test_the_last_position_is_drawn_too():
    picks, _ = draws.positions(torch.tensor([0.0] * 299 + [1.0]).double(), draws.of_image(0, 0))
    assert picks.eq(299).all()


# --- nothing to go by -----------------------------------------------------------------------------------------------


def test_where_no_gradient_arrives_values_count_a_little():
    """Else the first range that is tried would be as good as any, a twentieth of the values'."""
    values, nothing = torch.linspace(-1, 1, 1001), torch.zeros(1001)
    grid = best_range(values, nothing, lambda x: x, torch.zeros_like(LEVELS))
    assert -grid.zero_point * grid.scale < -0.5


def test_images_that_count_nothing_change_no_moments():
    """Those that come first give the offset of float32 sums: here they give none."""
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    x = torch.randn(2 * TOGETHER, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = [
        Seen(one, one.flatten(1), torch.arange(9), torch.full((9,), float(index >= TOGETHER)))
        for index, one in enumerate(x)
    ]
    all_of_them, late = (measure_moments(node, torch.Size((2, 2, 1, 1)), s) for s in (seen, seen[TOGETHER:]))
    # float32 products, around another offset
    torch.testing.assert_close(all_of_them.hessian, late.hessian, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(all_of_them.cross, late.cross, rtol=1e-4, atol=1e-6)


def test_inputs_that_never_change_leave_all_of_the_error():
    assert left_by(torch.zeros(3, 3).double()) == 1
    assert left_by(-torch.eye(3).double()) == 1


def test_an_image_enters_the_lockstep_as_the_bytes_it_is():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(_Side({INPUT: IMAGE_GRID}, "cpu").enter(pixels), pixels)
    assert torch.equal(_Side({}, "cpu").enter(pixels), pixels.float() / 255)


# --- epsilons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weights", "end"])
def test_epsilons_are_taken_before_weights_are_folded_and_at_the_end(tmp_path, monkeypatch, which):
    """Either call alone is not enough: `_fill` checks what becomes of them, and may rebuild layers."""
    network = Network(TINY, nc=2, na=3).eval()
    randomise(network)
    for module_ in network.modules():
        if isinstance(module_, torch.nn.BatchNorm2d):
            module_.eps = 0.25
    path = tmp_path / "e.pt"
    path.write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])))
    fill, seen = checkpoint._fill, []

    def watched(made, *rest):
        norms = [m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        seen.extend(m.eps for m in norms)
        result = fill(made, *rest)
        for norm in norms:
            norm.eps = 1e-3  # as a layer made anew has it
        return result

    monkeypatch.setattr(checkpoint, "_fill", watched)
    loaded = load_checkpoint(path).network
    if which == "weights":
        assert set(seen) == {0.25}
    else:
        assert {m.eps for m in loaded.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.25}
