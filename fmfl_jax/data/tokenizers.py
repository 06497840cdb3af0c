"""Tokenizers: one small type over tokenizer.json, GGUF, SentencePiece, llama2.c's tokenizer.bin, and plain bytes.

`encode` adds no special token and `decode` shows none: whoever builds windows or prompts adds `opening` and eos_id.
The libraries `tokenizers` and `sentencepiece` are imported only by the loader that needs them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fmfl_jax.data import gguf_tokenizer, llama2c_tokenizer
from fmfl_jax.data.chat import ChatTemplate
from fmfl_jax.data.gguf_file import MAGIC, read_gguf

# Where a piece of text ends inside a UTF-8 character, every decoder here writes this character.
_INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back.

    name: where it came from, for messages.
    vocab_size: ids are 0 ... vocab_size - 1 (a model's embedding may be larger).
    bos_id, eos_id: the ids that open and close a document, None where the tokenizer has none.
    encode_text, decode_ids: the work itself; call `encode` and `decode` instead.
    add_bos: whether a text begins with bos, as the checkpoint has it (`with_bos` changes it).
    chat_template: how the checkpoint writes conversations, None where it does not say.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode_text: Callable[[str], Sequence[int] | np.ndarray]
    decode_ids: Callable[[list[int]], str]
    add_bos: bool
    chat_template: ChatTemplate | None = None

    @property
    def opening(self) -> list[int]:
        """The ids that a text begins with: [bos_id] or []."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

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
        add_bos=False,
    )


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """The tokenizer with bos before a text as asked: "auto" (as the checkpoint has it), "always" or "never".

    Raises ValueError for "always" where the tokenizer has no bos.
    """
    if bos not in ("auto", "always", "never"):
        raise ValueError(f"bos {bos!r}: expected auto, always or never")
    if bos == "always" and tokenizer.bos_id is None:
        raise ValueError(f"bos=always: {tokenizer.name} has no token that begins a document")
    return tokenizer if bos == "auto" else dataclasses.replace(tokenizer, add_bos=bos == "always")


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a file, or of a checkpoint folder; "bytes" gives `byte_tokenizer`.

    A file is known by its content: tokenizer.json (JSON), GGUF, llama2.c's tokenizer.bin, else SentencePiece. In a
    folder the first of tokenizer.json, tokenizer.model, tokenizer.bin, tok*.bin is taken. bos and eos of a
    tokenizer.json come from the tokenizer_config.json beside it or, where that is silent, the config.json; other
    formats name their own. Whether a text begins with bos, the post-processor of tokenizer.json says (add_bos_token is
    not looked at beside one: transformers 5 does not either), for SentencePiece add_bos_token, true where it is not
    said, and for GGUF its metadata; llama2.c puts it.

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
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:  # before the whole is read: the model is in it
            return _load_gguf(path)
    data = path.read_bytes()
    if data.lstrip()[:1] == b"{":
        return _load_huggingface(path)
    pieces = llama2c_tokenizer.read_pieces(data)
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
    """tokenizer.json, with what tokenizer_config.json, chat_template.jinja and config.json beside it say."""
    config = _read_json(path.with_name("tokenizer_config.json"))
    template = path.with_name("chat_template.jinja")
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    ids = _read_json(path.with_name("config.json"))
    return _huggingface_tokenizer(str(path), path.read_text(encoding="utf-8"), config, ids)


def _load_gguf(path: pathlib.Path) -> Tokenizer:
    metadata = read_gguf(path).metadata
    try:
        backend = json.dumps(gguf_tokenizer.tokenizer_json(metadata))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return _huggingface_tokenizer(str(path), backend, gguf_tokenizer.tokenizer_config(metadata), {})


def _huggingface_tokenizer(name: str, text: str, config: dict, model_config: dict) -> Tokenizer:
    """The content of a tokenizer.json through the `tokenizers` library; config: its tokenizer_config.json."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # The library raises bare Exception.
        raise ValueError(f"{name}: not a Hugging Face tokenizer.json ({e})") from e
    backend.no_truncation()
    backend.no_padding()
    bos_id, eos_id = (_special_id(name, config, model_config, backend.token_to_id, role) for role in ("bos", "eos"))
    add_bos = backend.post_processor is not None and backend.encode("").ids[:1] == [bos_id]
    # Left out by id: the library's own skip_special_tokens misses special tokens that are declared "normalized".
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special} | {bos_id, eos_id}
    return Tokenizer(
        name=name,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        # The "fast" call keeps no offsets: half the time on a long text.
        encode_text=lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        decode_ids=lambda ids: backend.decode([i for i in ids if i not in special], skip_special_tokens=False),
        add_bos=add_bos and bos_id is not None,
        chat_template=_chat_template(config),
    )


def _content(token: str | dict | None) -> str | None:
    """The text of a token in tokenizer_config.json."""
    return token["content"] if isinstance(token, dict) else token


def _chat_template(config: dict) -> ChatTemplate | None:
    """The template of a tokenizer_config.json; of several, the one called "default"."""
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {role: _content(token) for role, token in config.items() if role.endswith("_token")}
    return ChatTemplate(source=source, special_tokens={role: t for role, t in tokens.items() if isinstance(t, str)})


def _special_id(name: str, config: dict, model_config: dict, token_to_id, role: str) -> int | None:
    """The id of "bos" or "eos" by tokenizer_config.json, else by config.json; an explicit null means none."""
    if f"{role}_token" in config:
        token = _content(config[f"{role}_token"])
        if token is None:
            return None
        token_id = token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name}: has no token {token!r}, the {role}_token of its tokenizer_config.json")
        return token_id
    token_id = model_config.get(f"{role}_token_id")
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
        add_bos=bos_id is not None
        and _read_json(path.with_name("tokenizer_config.json")).get("add_bos_token") is not False,
    )


def _llama2c_tokenizer(name: str, pieces: list[bytes], scores: list[float]) -> Tokenizer:
    encode_text, decode_ids = llama2c_tokenizer.make_codec(pieces, scores)
    return Tokenizer(
        name=name,
        vocab_size=len(pieces),
        bos_id=llama2c_tokenizer.BOS,
        eos_id=llama2c_tokenizer.EOS,
        encode_text=encode_text,
        decode_ids=decode_ids,
        add_bos=True,
    )
