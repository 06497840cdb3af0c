"""Messages as bytes: records of a fixed size by client, and integers of m bits packed without a gap."""

import numpy as np


class ProtocolError(Exception):
    """A peer broke the protocol, or too few are left. peer: its number, or None. reason: the text without it."""

    def __init__(self, text: str, peer: int | None = None):
        super().__init__(text if peer is None else f"client {peer}: {text}")
        self.peer, self.reason = peer, text


_ID_BYTES = 4


def pack_records(records: dict[int, bytes]) -> bytes:
    """{client: blob}, blobs of one size -> bytes, in the order of the clients' numbers (uint32, little-endian)."""
    return b"".join(client.to_bytes(_ID_BYTES, "little") + records[client] for client in sorted(records))


def unpack_records(message: bytes, size: int, *, peer: int | None = None) -> dict[int, bytes]:
    """The records of `size` bytes each. ProtocolError about the sender for a wrong length, order or a client twice."""
    stride = _ID_BYTES + size
    if len(message) % stride:
        raise ProtocolError(f"a message of {len(message)} bytes is no list of records of {stride}", peer)
    records, last = {}, -1
    for start in range(0, len(message), stride):
        client = int.from_bytes(message[start : start + _ID_BYTES], "little")
        if client <= last:
            raise ProtocolError(f"client {client} stands twice in a list, or out of order", peer)
        records[client], last = message[start + _ID_BYTES : start + stride], client
    return records


def packed_size(num_values: int, bits: int) -> int:
    """Bytes of `pack_bits`."""
    return -(-num_values * bits // 8)


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """uint32 [n] below 2^bits -> ceil(n bits / 8) bytes, low bits first."""
    groups = np.zeros((-(-len(values) // 8), 8), np.uint32)  # 8 values fill `bits` whole bytes
    groups.reshape(-1)[: len(values)] = values
    packed = np.zeros((len(groups), bits), np.uint8)
    for value, byte, shift in _overlaps(bits):
        column = groups[:, value]
        packed[:, byte] |= (column << shift if shift >= 0 else column >> -shift).astype(np.uint8)
    return packed.tobytes()[: packed_size(len(values), bits)]


def unpack_bits(packed: bytes, num_values: int, bits: int, *, peer: int | None = None) -> np.ndarray:
    """The inverse: uint32 [n]. ProtocolError about the sender for a wrong length."""
    if len(packed) != packed_size(num_values, bits):
        raise ProtocolError(f"a vector of {len(packed)} bytes, expected {packed_size(num_values, bits)}", peer)
    count = -(-num_values // 8)
    data = np.frombuffer(packed.ljust(count * bits, b"\0"), np.uint8).reshape(count, bits)
    groups = np.zeros((count, 8), np.uint32)
    for value, byte, shift in _overlaps(bits):
        column = data[:, byte].astype(np.uint32)
        groups[:, value] |= column >> shift if shift >= 0 else column << -shift
    return groups.reshape(-1)[:num_values] & np.uint32(2**bits - 1)


def _overlaps(bits: int):
    """(value, byte, shift) of all bytes that a value of a group of 8 touches; shift: the value's place in the byte."""
    for value in range(8):
        for byte in range(bits * value // 8, (bits * (value + 1) - 1) // 8 + 1):
            yield value, byte, bits * value - 8 * byte
