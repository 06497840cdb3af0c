"""llama2.c's tokenizer.bin (https://github.com/karpathy/llama2.c): the file, and the encoding that run.c does."""

import functools
import heapq
import re
import struct
from collections.abc import Callable

# llama2.c's tokenizer.bin: ids 0 <unk>, 1 <s>, 2 </s>, then the 256 bytes, then the pieces.
BOS, EOS, _FIRST_BYTE, FIRST_PIECE = 1, 2, 3, 259


def read_pieces(data: bytes) -> tuple[list[bytes], list[float]] | None:
    """Pieces and scores of a tokenizer.bin, or None where the bytes are not of that format.

    int32 max_token_length, then to the end of the file, per token: float32 score, int32 length, the bytes.
    """
    if len(data) < 4:
        return None
    (longest,) = struct.unpack_from("<i", data)
    pieces, scores, offset = [], [], 4
    while offset < len(data):
        if offset + 8 > len(data):
            return None
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 <= length <= longest or offset + length > len(data):
            return None
        pieces.append(data[offset : offset + length])
        scores.append(score)
        offset += length
    if pieces[_FIRST_BYTE:FIRST_PIECE] != [b"<0x%02X>" % byte for byte in range(256)]:
        return None
    return pieces, scores


def make_codec(
    pieces: list[bytes], scores: list[float]
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """(encode, decode): the byte-pair encoding of run.c, always the adjacent pair whose merged piece scores best, the
    leftmost of equals; a character that is no piece becomes its bytes."""
    # Only real pieces take part in merges: "<s>" written in a text is five characters.
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if i >= FIRST_PIECE}
    # Where no piece goes on after a space that follows another character, no merge crosses the start of a word: words
    # are encoded one by one, and remembered.
    by_word = not any(re.search(rb"[^ ] ", piece) for piece in ids)
    as_bytes = [bytes([i - _FIRST_BYTE]) if _FIRST_BYTE <= i < FIRST_PIECE else p for i, p in enumerate(pieces)]
    as_bytes[BOS] = as_bytes[EOS] = b""

    @functools.lru_cache(maxsize=1 << 16)
    def encode_part(part: str) -> list[int]:
        symbols = []
        for character in part:
            character = character.encode("utf-8")
            symbols += [ids[character]] if character in ids else [_FIRST_BYTE + byte for byte in character]
        return _merge_pairs(symbols, pieces, scores, ids)

    def encode_text(text: str) -> list[int]:
        if not text:
            return []
        text = " " + text  # llama2.c's dummy prefix
        parts = re.findall(r" *[^ ]+| +", text) if by_word else [text]
        return [i for part in parts for i in encode_part(part)]

    def decode_ids(token_ids: list[int]) -> str:
        text = b"".join(as_bytes[i] for i in token_ids)
        return text.removeprefix(b" ").decode("utf-8", errors="replace")

    return encode_text, decode_ids


def _merge_pairs(symbols: list[int], pieces: list[bytes], scores: list[float], ids: dict[bytes, int]) -> list[int]:
    """Merges the best pair until none is left; a heap over a linked list, so O(n log n) in the number of symbols."""
    symbols = list(symbols)  # symbols[k] is -1 once merged into its left neighbour
    following = list(range(1, len(symbols) + 1))
    preceding = list(range(-1, len(symbols) - 1))
    heap = []

    def offer(left: int) -> None:
        right = following[left] if left >= 0 else len(symbols)
        if right < len(symbols):
            merged = ids.get(pieces[symbols[left]] + pieces[symbols[right]])
            if merged is not None:
                heapq.heappush(heap, (-scores[merged], left, symbols[left], symbols[right], merged))

    for left in range(len(symbols) - 1):
        offer(left)
    while heap:
        _, left, left_id, right_id, merged = heapq.heappop(heap)
        right = following[left]
        if symbols[left] != left_id or right >= len(symbols) or symbols[right] != right_id:
            continue  # one of the two was merged elsewhere since
        symbols[left], symbols[right] = merged, -1
        following[left] = following[right]
        if following[left] < len(symbols):
            preceding[following[left]] = left
        offer(left)
        offer(preceding[left])
    return [i for i in symbols if i >= 0]
