"""Integers as bits, against codes written out as text."""

import numpy as np
import pytest

from fmfl_jax.transport.bits import pack, pack_elias, unpack, unpack_elias


def octets(text: str) -> bytes:
    """Of a text of 0 and 1, filled up with 0."""
    return bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))


def elias(level: int) -> str:
    """The code written out: Elias gamma of |level| + 1, then a sign bit if not 0."""
    binary = bin(abs(level) + 1)[2:]
    return "0" * (len(binary) - 1) + binary + ("" if level == 0 else "1" if level < 0 else "0")


def test_fixed_widths():
    rng = np.random.default_rng(3)
    for width in range(33):
        values = rng.integers(0, 2**width, size=11)
        payload = pack(values, width)
        assert payload == octets("".join(f"{v:0{width}b}" for v in values) if width else "")
        np.testing.assert_array_equal(unpack(payload, width, 11), values)
    with pytest.raises(ValueError, match="not 2 values of 3 bits"):
        unpack(octets("1010011"), 3, 2)
    with pytest.raises(ValueError, match="not 3 values of 3 bits"):
        unpack(b"\x00", 3, 3)


@pytest.mark.parametrize("largest", [0, 1, 7, 300, 2**31 - 1])
def test_elias_codes(largest):
    rng = np.random.default_rng(largest)
    for count in (0, 1, 2, 501):
        levels = rng.integers(-largest, largest, size=count, endpoint=True)
        payload = pack_elias(levels)
        assert payload == octets("".join(elias(int(level)) for level in levels))
        np.testing.assert_array_equal(unpack_elias(payload, count), levels)


@pytest.mark.parametrize(
    "text, count, why",
    [
        ("0100", 2, "end with its last code"),  # the zeros after a 1 and its sign are no second code
        ("00000000", 1, "end with its last code"),
        ("", 1, "ends before"),
        ("1" * 8, 9, "ends before"),
        ("1" + "0" * 15, 1, "end with its last code"),  # a byte too many
        ("10000001", 1, "end with its last code"),
        ("0" * 32 + "1" + "0" * 33, 1, "longer than any"),
    ],
)
def test_what_is_no_elias_code_is_refused(text, count, why):
    with pytest.raises(ValueError, match=why):
        unpack_elias(octets(text), count)
