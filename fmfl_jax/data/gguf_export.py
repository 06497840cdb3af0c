"""Tokenizers of every format as GGUF's metadata (see gguf_tokenizer for the way back)."""

import json
import pathlib
from typing import Any

from fmfl_jax.data import llama2c_tokenizer
from fmfl_jax.data.gguf_file import is_gguf, read_gguf
from fmfl_jax.data.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from fmfl_jax.data.tokenizers import load_tokenizer

_PREFIX = "tokenizer."
_ROLES = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


def tokenizer_metadata(path: pathlib.Path) -> dict[str, Any]:
    """{"tokenizer.ggml.model": ..., ...} of a tokenizer's file: GGUF, tokenizer.json, SentencePiece or llama2.c.

    Raises ValueError for a tokenizer that has no form in GGUF known here, and what `load_tokenizer` raises.
    """
    if is_gguf(path):
        return {key: value for key, value in read_gguf(path).metadata.items() if key.startswith(_PREFIX)}
    tokenizer = load_tokenizer(path)
    data = path.read_bytes()
    pieces = llama2c_tokenizer.read_pieces(data)
    if data.lstrip()[:1] == b"{":
        beside = path.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        found = _of_tokenizer_json(json.loads(data), config)
    elif pieces is not None:
        found = _of_pieces([piece.decode("utf-8", errors="replace") for piece in pieces[0]], pieces[1])
    else:
        found = _of_sentencepiece(path)
    for role, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token_id is not None:
            found[f"{role}_token_id"] = token_id
    found["add_bos_token"] = tokenizer.add_bos
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.source
    return metadata


def _of_sentencepiece(path: pathlib.Path) -> dict[str, Any]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokens = [sp.id_to_piece(i) for i in range(sp.vocab_size())]

    def kind(i: int) -> int:
        tests = ((sp.is_unknown, UNKNOWN), (sp.is_control, CONTROL), (sp.is_byte, BYTE), (sp.is_unused, UNUSED))
        return next((number for test, number in tests if test(i)), NORMAL)

    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [sp.get_score(i) for i in range(len(tokens))],
        "token_type": [kind(i) for i in range(len(tokens))],
        "unknown_token_id": sp.unk_id(),
        # What a text's first piece is tells whether a space was put before it.
        "add_space_prefix": sp.encode("a", out_type=str)[0].startswith(SPACE),
    }


def _of_pieces(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """llama2.c's: 0 unknown, 1 and 2 control, the 256 bytes, and pieces with spaces as they are."""
    first = llama2c_tokenizer.FIRST_PIECE
    return {
        "model": "llama",
        "pre": "default",
        "tokens": ["<unk>", "<s>", "</s>", *pieces[3:first], *(piece.replace(" ", SPACE) for piece in pieces[first:])],
        "scores": scores,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) - first),
        "unknown_token_id": 0,
        "add_space_prefix": True,
    }


def _of_tokenizer_json(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Of the contents of a tokenizer.json and its tokenizer_config.json."""
    model = tokenizer["model"]
    vocab = dict(model.get("vocab") or {}) if model.get("type", "BPE") == "BPE" else None
    if vocab is None:
        raise ValueError(f"a tokenizer of type {model.get('type')!r} cannot be written to GGUF, expected BPE")
    kinds = {token: NORMAL for token in vocab}
    for token in tokenizer.get("added_tokens") or []:
        vocab[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    size = max(vocab.values()) + 1
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, kinds[token]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    found = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        found |= _sentencepiece_metadata(tokenizer, merges, tokens, types)
    else:
        found |= {"model": "gpt2", "pre": _pre_name(tokenizer), "merges": [" ".join(merge) for merge in merges]}
    for role, key in _ROLES:
        token = config.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        token = model.get("unk_token") if token is None and role == "unk" else token
        if token in vocab:
            found[f"{key}_token_id"] = vocab[token]
    return found


def _sentencepiece_metadata(tokenizer: dict[str, Any], merges, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """model, scores (the place of a piece's first merge, negative) and the space before a text; marks byte tokens."""
    place = {}
    for i, (left, right) in enumerate(merges):
        place.setdefault(left + right, i)
    scores = [-float(place.get(token, len(merges))) for token in tokens]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif token == tokenizer["model"].get("unk_token"):
            types[i] = UNKNOWN
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prefix = any(step.get("type") == "Prepend" for step in steps) or pre.get("prepend_scheme") in ("first", "always")
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _pre_name(tokenizer: dict[str, Any]) -> str:
    """GGUF's name of the pre-tokenizer."""

    def plain(step):
        # trim_offsets moves offsets only; a Sequence of one is its step.
        if isinstance(step, dict):
            inner = step.get("pretokenizers")
            if inner is not None and len(inner) == 1:
                return plain(inner[0])
            return {key: plain(value) for key, value in step.items() if key != "trim_offsets"}
        return [plain(x) for x in step] if isinstance(step, list) else step

    for name, step in PRE_TOKENIZERS.items():
        if plain(step) == plain(tokenizer.get("pre_tokenizer")):
            return name
    raise ValueError("this tokenizer's pre-tokenizer has no name in GGUF known here: " + ", ".join(PRE_TOKENIZERS))
