"""Tokenizers: one small type over tokenizer.json, SentencePiece, llama2.c's tokenizer.bin, and plain bytes.

`encode` adds no special token and `decode` shows none: whoever builds windows or prompts adds bos_id and eos_id.
The libraries `tokenizers` and `sentencepiece` are imported only by the loader that needs them.
"""

import dataclasses
import functools
import heapq
import json
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

# Where a piece of text ends inside a UTF-8 character, every decoder here writes this character.
_INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back.

    name: where it came from, for messages.
    vocab_size: ids are 0 ... vocab_size - 1 (a model's embedding may be larger).
    bos_id, eos_id: the ids that open and close a document, None where the tokenizer has none.
    encode_text, decode_ids: the work itself; call `encode` and `decode` instead.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode_text: Callable[[str], Sequence[int] | np.ndarray]
    decode_ids: Callable[[list[int]], str]

    def encode(self, text: str) -> np.ndarray:
        """int32 [num_tokens] ids of the text, without bos and eos."""
        return np.asarray(self.encode_text(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens (bos, eos) leave no trace in it.

        Raises ValueError for an id outside the vocabulary: model and tokenizer do not belong together.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"{self.name}: token id {i} is not among its {self.vocab_size} tokens")
        return self.decode_ids(ids)


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int], prompt_ids: Iterable[int] = ()) -> Iterator[str]:
    """Yields the text that each next id adds after prompt_ids, as soon as it is whole.

    An id that ends inside a UTF-8 character is held back until the character is complete or the ids end. The pieces
    joined are decode(prompt_ids + ids) without the leading decode(prompt_ids). Only the ids since the last piece but
    one are decoded again, so the cost does not grow with the length of the text.
    """
    window = list(prompt_ids)
    shown = tokenizer.decode(window).rstrip(_INCOMPLETE)
    held = 0  # ids at the end of the window whose text has not been yielded
    for i in ids:
        window.append(int(i))
        held += 1
        text = tokenizer.decode(window)
        if len(text) > len(shown) and not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            # Decoders drop the space before the first id, so the ids of the piece just yielded stay as context, unless
            # they begin inside a character that earlier ids opened (then a longer context is kept).
            tail = tokenizer.decode(window[-held:])
            if tail.startswith(_INCOMPLETE):
                shown = text
            else:
                window, shown = window[-held:], tail
            held = 0
    if held:
        text = tokenizer.decode(window)
        if len(text) > len(shown):
            yield text[len(shown) :]


def byte_tokenizer() -> Tokenizer:
    """The default: token ids are the 256 bytes of UTF-8, no bos, no eos."""
    return Tokenizer(
        name="bytes",
        vocab_size=256,
        bos_id=None,
        eos_id=None,
        encode_text=lambda text: np.frombuffer(text.encode("utf-8"), np.uint8),
        decode_ids=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a file, or of a checkpoint folder; "bytes" gives `byte_tokenizer`.

    A file is known by its content: tokenizer.json (JSON), llama2.c's tokenizer.bin, else SentencePiece. In a folder
    the first of tokenizer.json, tokenizer.model, tokenizer.bin, tok*.bin is taken. bos and eos of a tokenizer.json come
    from the tokenizer_config.json beside it or, where that is silent, the config.json; other formats name their own.

    Raises:
      FileNotFoundError: no such file, or a folder without a tokenizer.
      ValueError: a file that is none of the formats, or is damaged.
    """
    if str(path) == "bytes":
        return byte_tokenizer()
    path = pathlib.Path(path)
    if path.is_dir():
        path = _tokenizer_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file or checkpoint folder")
    data = path.read_bytes()
    if data.lstrip()[:1] == b"{":
        return _load_huggingface(path)
    pieces = _read_llama2c(data)
    if pieces is not None:
        return _llama2c_tokenizer(str(path), *pieces)
    return _load_sentencepiece(path)


def model_tokenizer(path: str | pathlib.Path | None, *, vocab_size: int, model_name: str) -> Tokenizer:
    """The tokenizer at `path`; where a model of 256 tokens names none, its tokens are bytes.

    Raises ValueError, naming the model, where a larger one names none, and what `load_tokenizer` raises.
    """
    if path is None and vocab_size != 256:
        raise ValueError(f"{model_name} carries no tokenizer: name one with tokenizer=FILE")
    return byte_tokenizer() if path is None else load_tokenizer(path)


def _tokenizer_file(folder: pathlib.Path) -> pathlib.Path:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
    for file in [folder / name for name in names] + sorted(folder.glob("tok*.bin")):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder}: no tokenizer in this folder (looked for {', '.join(names)}, tok*.bin)")


def _load_huggingface(path: pathlib.Path) -> Tokenizer:
    """tokenizer.json through the `tokenizers` library."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # The library raises bare Exception.
        raise ValueError(f"{path}: not a Hugging Face tokenizer.json ({e})") from e
    backend.no_truncation()
    backend.no_padding()
    bos_id, eos_id = (_special_id(path, backend.token_to_id, role) for role in ("bos", "eos"))
    # Left out by id: the library's own skip_special_tokens misses special tokens that are declared "normalized".
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special} | {bos_id, eos_id}
    return Tokenizer(
        name=str(path),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        # The "fast" call keeps no offsets: half the time on a long text.
        encode_text=lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        decode_ids=lambda ids: backend.decode([i for i in ids if i not in special], skip_special_tokens=False),
    )


def _special_id(path: pathlib.Path, token_to_id: Callable[[str], int | None], role: str) -> int | None:
    """The id of "bos" or "eos" by the configuration files beside tokenizer.json; an explicit null means none."""
    config = _read_json(path.with_name("tokenizer_config.json"))
    if f"{role}_token" in config:
        token = config[f"{role}_token"]
        token = token["content"] if isinstance(token, dict) else token
        if token is None:
            return None
        token_id = token_to_id(token)
        if token_id is None:
            raise ValueError(f"{path}: has no token {token!r}, the {role}_token of its tokenizer_config.json")
        return token_id
    token_id = _read_json(path.with_name("config.json")).get(f"{role}_token_id")
    # Chat models list several ends; the first is the end of a text.
    return next(iter(token_id), None) if isinstance(token_id, list) else token_id


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return config


def _load_sentencepiece(path: pathlib.Path) -> Tokenizer:
    """tokenizer.model through the `sentencepiece` library."""
    import sentencepiece

    try:
        backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise ValueError(
            f"{path}: not a tokenizer; expected tokenizer.json, a SentencePiece model or llama2.c's tokenizer.bin"
        ) from e
    bos_id, eos_id = (i if i >= 0 else None for i in (backend.bos_id(), backend.eos_id()))
    return Tokenizer(
        name=str(path),
        vocab_size=backend.vocab_size(),
        bos_id=bos_id,
        eos_id=eos_id,
        encode_text=backend.encode,
        decode_ids=backend.decode,
    )


# llama2.c's tokenizer.bin: ids 0 <unk>, 1 <s>, 2 </s>, then the 256 bytes, then the pieces.
_BOS, _EOS, _FIRST_BYTE, _FIRST_PIECE = 1, 2, 3, 259


def _read_llama2c(data: bytes) -> tuple[list[bytes], list[float]] | None:
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
    if pieces[_FIRST_BYTE:_FIRST_PIECE] != [b"<0x%02X>" % byte for byte in range(256)]:
        return None
    return pieces, scores


def _llama2c_tokenizer(name: str, pieces: list[bytes], scores: list[float]) -> Tokenizer:
    """The byte-pair encoding of llama2.c's run.c: always the adjacent pair whose merged piece scores best, the leftmost
    of equals; a character that is no piece becomes its bytes."""
    # Only real pieces take part in merges: "<s>" written in a text is five characters.
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if i >= _FIRST_PIECE}
    # Where no piece goes on after a space that follows another character, no merge crosses the start of a word: words
    # are encoded one by one, and remembered.
    by_word = not any(re.search(rb"[^ ] ", piece) for piece in ids)
    as_bytes = [bytes([i - _FIRST_BYTE]) if _FIRST_BYTE <= i < _FIRST_PIECE else p for i, p in enumerate(pieces)]
    as_bytes[_BOS] = as_bytes[_EOS] = b""

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

    return Tokenizer(
        name=name,
        vocab_size=len(pieces),
        bos_id=_BOS,
        eos_id=_EOS,
        encode_text=encode_text,
        decode_ids=decode_ids,
    )


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
