"""Checkpoints no one should trust."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import other_files, other_models, zips
from case import Case
from families import families
from pickles import code, opcodes
from tampered import tampered


def all_cases(good: Path, canary: Path) -> Iterator[Case]:
    """Every kind, made from one good checkpoint; the payloads of the first would write `canary`."""
    yield from code(canary)
    yield from opcodes()
    yield from zips(good)
    yield from other_files()
    yield from other_models()
    yield from tampered(good)
    yield from families()
