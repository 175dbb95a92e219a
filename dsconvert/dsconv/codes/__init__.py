"""The codes there are. A new one is a file here, and one line in CODES."""

from __future__ import annotations

from dsconvert.dsconv.codes.free import FREE
from dsconvert.dsconv.codes.real import REAL
from dsconvert.dsconv.codes.trellis import TRELLIS
from dsconvert.dsconv.format import Code, WeightFormat

# by the name that files have of it
CODES: dict[str, Code] = {
    "trellis": TRELLIS,  # integers that hang together: less error at 1 to 4 bits
    "free": FREE,  # any integer of its bits
    "real": REAL,  # free integers with the paper's real KDS
}


def format_of(bits: int, block_size: int, code: str) -> WeightFormat:
    """The format that `WeightFormat.spelled` says. Raises ValueError for a code that is not there."""
    if code not in CODES:
        raise ValueError(f"there is no code {code!r}")
    return WeightFormat(bits, block_size, CODES[code])


def usual_format(bits: int, chi: int, block_size: int) -> WeightFormat:
    """What a layer of chi input channels is stored in: at 8 bits one block of free integers, which makes it plain int8;
    at 1 to 4 bits along a trellis, where that fits."""
    code = TRELLIS if TRELLIS.fits(bits, chi, block_size) else FREE
    return WeightFormat(bits, block_size if bits < 8 else chi, code)
