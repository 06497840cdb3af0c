"""Five tokenizer families against transformers (golden/make_tokenizers.py), from tokenizer.json and through GGUF."""

import dataclasses
import json
import pathlib

import pytest

from fmfl_jax.data import gguf_export, gguf_tokenizer, tokenizers
from fmfl_jax.data.chat import ChatTemplate

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "tokenizers"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
# GGUF, as llama.cpp, has one way for SentencePiece: a space before every stretch between special tokens, and before a
# text that begins with one too.
ONE_WAY = "mistral"


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
