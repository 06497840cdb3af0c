"""Five tokenizer families against transformers (golden/make_tokenizers.py), from tokenizer.json and through GGUF."""

import dataclasses
import json
import pathlib
import struct

import numpy as np
import pytest
import sentencepiece

from fmfl_jax.data import corpora, gguf_export, gguf_tokenizer, tokenizers
from fmfl_jax.data.chat import ChatTemplate
from tests.golden import gguf_case

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "tokenizers"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
# GGUF, as llama.cpp, has one way for SentencePiece: a space before every stretch between special tokens, and before a
# text that begins with one too.
ONE_WAY = "mistral"
TEXT = 'Once  upon a time,\n\n 🦙 said: "Élan!"\tнещо 日本\u2009語 x  the functions of classes are returned '


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param, json.loads((FOLDER / request.param / "expected.json").read_text())


def through_gguf(folder, out):
    """The tokenizer of a folder as GGUF's metadata, and that as a folder again."""
    metadata = gguf_export.tokenizer_metadata(folder / "tokenizer.json")
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(gguf_tokenizer.tokenizer_json(metadata)))
    (out / "tokenizer_config.json").write_text(json.dumps(gguf_tokenizer.tokenizer_config(metadata)))
    return out


@pytest.mark.parametrize("by_gguf", [False, True])
def test_prompts_and_chats_as_transformers_has_them(family, by_gguf, tmp_path):
    name, expected = family
    folder = through_gguf(FOLDER / name, tmp_path / name) if by_gguf else FOLDER / name
    tokenizer = tokenizers.load_tokenizer(folder)
    one_way = by_gguf and name == ONE_WAY
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        if one_way and text.startswith(" "):
            continue
        assert tokenizer.opening + tokenizer.encode(text).tolist() == ids, text
        assert "\ufffd" not in tokenizer.decode(ids)
    chat = tokenizer.chat_template.render(expected["messages"])
    assert chat == expected["chat"]
    if not one_way:
        assert tokenizer.encode(chat).tolist() == expected["chat_ids"]


def test_sentencepiece_through_gguf(tmp_path):
    """A SentencePiece model's vocabulary, kinds and scores, and llama2.c's copy of it, against sentencepiece."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpora.python_topics()[:12]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    sp = tokenizers.load_tokenizer(tmp_path / "tokenizer.model")
    metadata = gguf_export.tokenizer_metadata(tmp_path / "tokenizer.model")
    assert metadata["tokenizer.ggml.add_bos_token"] and gguf_tokenizer.special_ids(metadata)["eos_token_id"] == 2
    path = gguf_case.write(tmp_path / "m.gguf", metadata, {"x": np.zeros(1, np.float32)})
    ours = tokenizers.load_tokenizer(path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size, ours.add_bos) == (1, 2, sp.vocab_size, True)
    for text in [TEXT, " lead", "", "  ", *corpora.python_topics()[12:16]]:
        assert ours.encode(text).tolist() == sp.encode(text).tolist()
        assert ours.decode(sp.encode(text)) == sp.decode(sp.encode(text))
    backend = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    entries = [(backend.get_score(i), backend.id_to_piece(i).replace("\u2581", " ").encode()) for i in range(600)]
    data = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in entries)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", max(len(piece) for _, piece in entries)) + data)
    copied = gguf_export.tokenizer_metadata(tmp_path / "tokenizer.bin")
    assert copied == metadata


def test_bos_as_asked(family):
    name, _ = family
    tokenizer = tokenizers.load_tokenizer(FOLDER / name)
    assert tokenizer.add_bos == (name in ("llama2", "llama3", "mistral"))
    assert tokenizers.with_bos(tokenizer, "auto") is tokenizer
    assert tokenizers.with_bos(tokenizer, "never").opening == []
    if tokenizer.bos_id is None:
        with pytest.raises(ValueError, match="no token that begins a document"):
            tokenizers.with_bos(tokenizer, "always")
    else:
        assert tokenizers.with_bos(tokenizer, "always").opening == [tokenizer.bos_id]


def test_what_gguf_cannot_name_is_refused(tmp_path):
    metadata = gguf_export.tokenizer_metadata(FOLDER / "llama3" / "tokenizer.json")
    for key, value, message in (
        ("model", "t5", "tokenizer.ggml.model is 't5': not implemented"),
        ("pre", "tekken", "tokenizer.ggml.pre is 'tekken': a pre-tokenizer not implemented"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("token_type", [1], "tokenizer.ggml.token_type has 1 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_tokenizer.tokenizer_json(metadata | {f"tokenizer.ggml.{key}": value})
    content = json.loads((FOLDER / "smollm" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no name in GGUF"):
        gguf_export.tokenizer_metadata(tmp_path / "tokenizer.json")


def test_templates_are_sandboxed_and_may_refuse():
    template = ChatTemplate(source="{{ raise_exception('roles must alternate') }}", special_tokens={})
    with pytest.raises(ValueError, match="roles must alternate"):
        template.render([])
    with pytest.raises(ValueError, match="unsafe"):
        dataclasses.replace(template, source="{{ ''.__class__.__mro__[1].__subclasses__() }}").render([])
    with pytest.raises(ValueError, match="chat template"):
        dataclasses.replace(template, source="{% if %}").render([])
    looped = "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    message = {"role": "user", "content": "<é>"}
    assert json.loads(dataclasses.replace(template, source=looped).render([message, message])) == message
