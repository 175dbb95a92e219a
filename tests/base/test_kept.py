"""What calibration keeps of images: in memory as long as there is room, else in files that nobody has to remove."""

from __future__ import annotations

import errno

import pytest
import torch
from conftest import grids_of, lockstep
from formats import fit_weight

from dsconvert.base import kept
from dsconvert.base.errors import InputError
from dsconvert.base.kept import InMemory, OnDisk, Room
from dsconvert.yolo.lower import lower

KINDS = [torch.uint8, torch.half, torch.float32]


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_kept_comes_back_in_any_order_from_either_place(dtype, tmp_path):
    values = [torch.randint(0, 200, (3, 5), generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    memory = Room(tmp_path).like(4, values[0])
    disk = Room(tmp_path, 0).like(4, values[0])
    assert isinstance(memory, InMemory)
    assert isinstance(disk, OnDisk)
    for place in (memory, disk):
        for index in (2, 0, 3, 1):
            place.put(index, values[index])
        place.put(0, values[3])
        assert [torch.equal(place.get(i), values[i or 3]) for i in (3, 1, 2, 0)] == [True] * 4
        assert place.get(1).dtype == dtype


def test_room_is_given_back_and_nothing_stays_on_disk(tmp_path):
    room = Room(tmp_path / "new", 100)
    first = room.kept(5, (10,), torch.uint8)
    assert room.left == 50
    second = room.kept(51, (1,), torch.uint8)
    assert isinstance(second, OnDisk)
    assert not list((tmp_path / "new").iterdir())  # the file has no name
    first.free()
    second.free()
    assert room.left == 100
    assert isinstance(room.kept(100, (1,), torch.uint8), InMemory)


def test_what_was_never_kept_is_not_made_up(tmp_path):
    disk = Room(tmp_path, 0).kept(2, (4,), torch.uint8)
    disk.put(0, torch.ones(4, dtype=torch.uint8))
    with pytest.raises(KeyError):
        disk.get(1)


def test_a_full_disk_is_one_sentence(tmp_path):
    disk = Room(tmp_path, 0).kept(2, (4,), torch.uint8)

    class Full:
        def seek(self, place):
            return place

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    disk.file = Full()
    with pytest.raises(InputError, match="no room for the values that calibration keeps"):
        disk.put(0, torch.ones(4, dtype=torch.uint8))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold calibration values"):
        Room(tmp_path / "file" / "below", 0).kept(1, (1,), torch.uint8)


def test_a_fit_is_the_same_from_memory_and_from_disk(tiny, picture, tmp_path):
    network, _ = tiny
    graph, params = lower(network.fused())
    batches = [picture, picture.flip(3), picture.flip(2)]
    own = grids_of(graph, params, batches)
    weights = {n.name: fit_weight(params[n.name].weight, 4, 32) for n in graph.convs()}
    made = [
        lockstep(graph, params, lambda node, weight, seen: weights[node.name], own, batches, room=room)
        for room in (Room(), Room(tmp_path, 0), Room(tmp_path, 20_000))
    ]
    for name, conv in made[0].items():
        for other in made[1:]:
            assert torch.equal(conv.bias, other[name].bias)
            assert torch.equal(conv.weight.cds_w, other[name].weight.cds_w)
    assert kept.MEMORY >= 1 << 28


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_a_system_that_cannot_be_asked_for_free_memory_keeps_it(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(kept.ctypes, "CDLL", refuse)
    kept.give_back()
