"""Follow what a pickle's opcodes would put on its stack, without building any of it.

Hashing can make a pickle take for ever. A tuple's hash visits all of its leaves, and forty tuples of twice the one
before have 2^40. Integers that differ by a multiple of 2^61 - 1 have the same hash, and a dictionary compares each such
key with all others. So keys of dictionaries must be text, numbers, None, short flat tuples of these, or objects, whose
hash is their place in memory. Integers are bounded, and so are the leaves of a tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_TUPLES = 100  # nested in each other; a checkpoint has 4
MAX_LEAVES = 2 << 20  # leaves of a tuple and the tuples in it; more than the bytes of a pickle that is read
MAX_KEY_PARTS = 16  # elements of a tuple that is a key
MAX_KEY = 1 << 53  # of an integer that is a key: hashes of larger ones can be made equal
MAX_INTEGER = 1 << 63  # LONG1 can hold 255 bytes


class _Item(NamedTuple):
    """An item on the stack.

    depth: of nested tuples.
    leaves: of these.
    key: whether it may be a dictionary's key.
    part: whether it may be a part of a key.
    """

    depth: int = 0
    leaves: int = 1
    key: bool = True
    part: bool = True


_PLAIN, _LARGE = _Item(), _Item(key=False, part=False)
_CONTAINERS = frozenset(("EMPTY_LIST", "EMPTY_DICT"))
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1, "REDUCE": 2, "NEWOBJ": 2,
          "BINPERSID": 1}  # fmt: skip
_INTEGERS = frozenset(("LONG1", "BININT", "BININT1", "BININT2"))


class Stack:
    """The stack and memo of one pickle."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Item] = {}

    def bears(self, op: str, arg: Any) -> bool:
        """Return whether the result of one opcode is quickly built.

        Raises IndexError or ValueError if items are missing.
        """
        items = self._items
        if op == "MARK":
            self._marks.append(len(items))
        elif op.endswith("PUT"):
            self._memo[arg] = items[-1]
        elif op.endswith("GET"):
            items.append(self._memo.get(arg, _PLAIN))
        elif op in ("TUPLE", "APPENDS", "SETITEMS"):
            start = self._marks.pop()
            taken = items[start:]
            del items[start:]
            if op == "SETITEMS":
                return all(item.key for item in taken[::2])
            if op == "TUPLE":
                return self._join(taken)
        elif op in _TAKES:
            taken = items[-_TAKES[op] :]
            if len(taken) < _TAKES[op]:
                raise IndexError
            del items[-_TAKES[op] :]
            if op.startswith("TUPLE"):
                return self._join(taken)
            if op == "SETITEM":
                return taken[0].key
            if op not in ("APPEND", "BUILD"):
                items.append(_PLAIN)
        elif op == "EMPTY_TUPLE":
            return self._join([])
        elif op not in ("PROTO", "STOP"):
            large = op in _INTEGERS and abs(arg) > MAX_KEY
            items.append(_LARGE if large or op in _CONTAINERS else _PLAIN)
            return not large or -MAX_INTEGER <= arg < MAX_INTEGER
        return True

    def _join(self, taken: list[_Item]) -> bool:
        depth = 1 + max((item.depth for item in taken), default=0)
        leaves = 1 + sum(item.leaves for item in taken)
        short = len(taken) <= MAX_KEY_PARTS and all(item.part for item in taken)
        self._items.append(_Item(depth, leaves, short, False))
        return depth <= MAX_TUPLES and leaves <= MAX_LEAVES
