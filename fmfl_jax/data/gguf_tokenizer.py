"""Tokenizers in GGUF's metadata, as the content of Hugging Face's tokenizer.json.

GGUF holds a vocabulary with the kind and score of each token, merges, and the name of the pre-tokenizer, for which
llama.cpp has the code (llama_vocab in src/llama-vocab.cpp). Two models are known here: "gpt2", byte-level BPE with a
named pre-tokenizer, and "llama", SentencePiece's BPE, whose merges follow from the scores.
"""

from typing import Any

# Token kinds of tokenizer.ggml.token_type (those of SentencePiece).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's mark of a space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


# {name in GGUF: pre_tokenizer of tokenizer.json}; where two names mean one, the first is written.
PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    },
    "qwen2": _split(_QWEN2),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json for the tokenizer of a file's metadata.

    Raises ValueError where the metadata names none, or a model or pre-tokenizer that is not known here.
    """
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)
    kind, tokens = get("model"), get("tokens")
    if kind is None or not tokens:
        raise ValueError(
            "tokenizer.ggml.tokens is missing: the file holds no tokenizer; name one with --tokenizer=FILE"
        )
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}: not implemented, expected 'gpt2' or 'llama'")
    types = get("token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries, tokenizer.ggml.tokens {len(tokens)}")
    shown = {CONTROL: True, USER_DEFINED: False, **({UNKNOWN: True} if kind == "llama" else {})}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": shown[t]}
        for i, (token, t) in enumerate(zip(tokens, types))
        if t in shown
    ]
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    parts = _byte_level_parts(metadata) if kind == "gpt2" else _sentencepiece_parts(metadata, tokens, types)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(metadata, tokens),
        "decoder": parts["decoder"],
        "model": model | {"vocab": {token: i for i, token in enumerate(tokens)}} | parts["model"],
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json that goes with `tokenizer_json`."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos(metadata)}
    config["clean_up_tokenization_spaces"] = False
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{role}_token"] = tokens[token_id] if token_id is not None and token_id < len(tokens) else None
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """{"bos_token_id": ..., "eos_token_id": ..., ...} as config.json has them; several ends are a list."""
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}_token_id")
    ends = sorted({token for token in (get("eos"), get("eot")) if token is not None})
    found = {"bos_token_id": get("bos"), "pad_token_id": get("padding")}
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {key: value for key, value in found.items() if value is not None}


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether a prompt begins with bos; where the file is silent, what llama.cpp takes for its kind of tokenizer."""
    if metadata.get("tokenizer.ggml.bos_token_id") is None:
        return False
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _post_processor(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Puts bos before a text where the file says so; eos is never put after one, since texts are prompts."""
    text = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    processor = {"type": "TemplateProcessing", "single": [text[0]], "pair": list(text), "special_tokens": {}}
    if adds_bos(metadata):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        opening = [{"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1)]
        processor["single"] = [opening[0], text[0]]
        processor["pair"] = [opening[0], text[0], opening[1], text[1]]
        processor["special_tokens"] = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return processor


def _byte_level_parts(metadata: dict[str, Any]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(map(repr, PRE_TOKENIZERS))
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}: a pre-tokenizer not implemented, expected one of {known}")
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or []]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": _byte_level(True),
        "model": {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _LLAMA3_NAMES,
            "merges": merges,
        },
    }


def _sentencepiece_parts(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores: expected one for each of tokenizer.ggml.tokens")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges_of_scores(tokens, scores, types),
        },
    }


def merges_of_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """Every way to make a piece of two others, the best-scored piece first: what SentencePiece merges by."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, UNUSED)}
    merges = []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [list(pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return merges
