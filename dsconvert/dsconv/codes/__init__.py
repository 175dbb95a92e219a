"""The list of all codes. To add one, add a file to this folder and a line to CODES."""

from __future__ import annotations

from dsconvert.dsconv.codes.free import FREE
from dsconvert.dsconv.codes.real import REAL
from dsconvert.dsconv.codes.trellis import TRELLIS
from dsconvert.dsconv.format import Code, WeightFormat

# the keys are the names in model files
CODES: dict[str, Code] = {
    "trellis": TRELLIS,  # integers chosen along a trellis, with less error at 1 to 4 bits
    "free": FREE,  # every integer of the given bits
    "real": REAL,  # free integers with the paper's real KDS
}


def format_of(bits: int, block_size: int, code: str) -> WeightFormat:
    """Return the format that `WeightFormat.spelled` describes. Raises ValueError for an unknown code."""
    if code not in CODES:
        raise ValueError(f"there is no code {code!r}")
    return WeightFormat(bits, block_size, CODES[code])


def usual_format(bits: int, chi: int, block_size: int) -> WeightFormat:
    """Return the default format for a layer of chi input channels.

    Up to 4 bits it is a trellis, where the layer allows one. Otherwise it is free integers. At 8 bits one block spans
    all channels, which makes the weight plain int8.
    """
    code = TRELLIS if TRELLIS.fits(bits, chi, block_size) else FREE
    return WeightFormat(bits, block_size if bits < 8 else chi, code)
