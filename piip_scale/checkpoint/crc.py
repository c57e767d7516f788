"""CRC-32 of bytes that follow each other, from the CRC-32 of each part: so one pass serves two checksums.

Source: ``crc32_combine`` of zlib 1.2.13, which Python's ``zlib`` does not offer: a checksum is a polynomial over GF(2),
and appending n bytes multiplies it by x to the power 8n, modulo CRC-32's own polynomial.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X = 1 << 30
_BITS_PER_BYTE = 8
_LENGTHS_KEPT = 1 << 12


def combined(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two parts end to end.

    Args:
        first: Of the first part; 0 for an empty one.
        second: Of the second.
        second_bytes: The second's length.
    """
    return _product(_power(second_bytes * _BITS_PER_BYTE), first) ^ second


def _product(a: int, b: int) -> int:
    result, bit = 0, _ONE
    while a:
        if a & bit:
            result, a = result ^ b, a ^ bit
        bit >>= 1
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result


@lru_cache(_LENGTHS_KEPT)
def _power(exponent: int) -> int:
    """The polynomial x to a power."""
    result, square = _ONE, _X
    while exponent:
        if exponent & 1:
            result = _product(square, result)
        square, exponent = _product(square, square), exponent >> 1
    return result
