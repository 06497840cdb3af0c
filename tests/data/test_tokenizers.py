"""The four tokenizer formats against each other, against sentencepiece, and streamed."""

import json
import struct

import numpy as np
import pytest
import sentencepiece

from fmfl_jax.data import corpora, tokenizers

TEXT = 'Once  upon a time,\n\n 🦙 said: "Élan!"\tнещо 日本\u2009語 x <s> </s>  '


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """A small SentencePiece BPE model of Llama's kind, trained here."""
    folder = tmp_path_factory.mktemp("sp")
    text = folder / "text.txt"
    text.write_text("\n".join(corpora.python_topics()[:20]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def export_llama2c(model_file, path):
    """The same vocabulary as llama2.c's tokenizer.bin (its export replaces the mark of a space by a space)."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [sp.id_to_piece(i).replace("▁", " ").encode() for i in range(sp.vocab_size())]
    pieces[1], pieces[2] = b"\n<s>\n", b"\n</s>\n"
    with open(path, "wb") as f:
        f.write(struct.pack("<i", max(map(len, pieces))))
        for i, piece in enumerate(pieces):
            f.write(struct.pack("<fi", sp.get_score(i), len(piece)) + piece)
    return path


def export_tokenizer_json(model_file, path):
    """The same vocabulary as a tokenizer.json: a merge for each way to build a piece of two, best score first."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece in sorted((p for p in vocab if vocab[p] >= 259), key=lambda p: -sp.get_score(vocab[p])):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prefix = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": sp.id_to_piece(i), **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": prefix},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **options},
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["bytes", "model", "bin", "json"])
def any_tokenizer(request, sentencepiece_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        return tokenizers.load_tokenizer("bytes")
    if request.param == "model":
        return tokenizers.load_tokenizer(sentencepiece_file.parent)
    if request.param == "bin":
        return tokenizers.load_tokenizer(export_llama2c(sentencepiece_file, folder / "tok.bin"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    export_tokenizer_json(sentencepiece_file, folder / "tokenizer.json")
    return tokenizers.load_tokenizer(folder)


def test_round_trip(any_tokenizer):
    for text in [TEXT.replace("<s>", "").replace("</s>", ""), "", " ", "a", "  a", "🦙", *corpora.python_topics()[:3]]:
        ids = any_tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert any_tokenizer.decode(ids) == text
        assert not np.isin([any_tokenizer.bos_id, any_tokenizer.eos_id], ids).any()


def test_bos_and_eos_leave_no_trace(any_tokenizer):
    ids = any_tokenizer.encode(" hi there").tolist()
    special = [i for i in (any_tokenizer.bos_id, any_tokenizer.eos_id) if i is not None]
    assert len(special) == (0 if any_tokenizer.name == "bytes" else 2)
    assert any_tokenizer.decode(special[:1] + ids + special[1:]) == " hi there"


def test_stream_is_decode(any_tokenizer):
    """Piece by piece, with any cut between prompt and continuation: joined, the pieces are what decode adds."""
    ids = any_tokenizer.encode(TEXT).tolist()
    for cut in range(len(ids)):
        pieces = list(tokenizers.stream_decode(any_tokenizer, iter(ids[cut:]), ids[:cut]))
        before = any_tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + "".join(pieces) == any_tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) < len(ids)


def test_stream_is_immediate_and_flushes(any_tokenizer):
    words = any_tokenizer.encode("ab cd").tolist()
    assert len(list(tokenizers.stream_decode(any_tokenizer, words))) >= len(words) - 1  # a first lone space is silent
    half = any_tokenizer.encode("a🦙").tolist()[:-1]
    assert "".join(tokenizers.stream_decode(any_tokenizer, half)) == any_tokenizer.decode(half)


def test_id_outside_the_vocabulary(any_tokenizer):
    for i in (-1, any_tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {i}"):
            any_tokenizer.decode([i])


def test_three_formats_of_one_vocabulary_agree(sentencepiece_file, tmp_path):
    """The project's own byte-pair code against sentencepiece and tokenizers, on text with and without byte fallback."""
    sp = tokenizers.load_tokenizer(sentencepiece_file)
    own = tokenizers.load_tokenizer(export_llama2c(sentencepiece_file, tmp_path / "tok.bin"))
    hf = tokenizers.load_tokenizer(export_tokenizer_json(sentencepiece_file, tmp_path / "tokenizer.json"))
    assert sp.vocab_size == own.vocab_size == hf.vocab_size == 600
    assert (own.bos_id, own.eos_id) == (sp.bos_id, sp.eos_id) == (1, 2)
    for text in [TEXT, "", " ", "   x", "aaaaaaaaaaaaa", *corpora.python_topics()[-12:]]:
        np.testing.assert_array_equal(own.encode(text), sp.encode(text))
        if "<s>" not in text:  # tokenizers takes special tokens written in a text for what they say
            np.testing.assert_array_equal(hf.encode(text), sp.encode(text))


def test_bin_merges_by_score_across_words(tmp_path):
    """Best score first, leftmost of equals; a piece over the space switches encoding by words off."""
    pieces = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % b for b in range(256)]
    scores = [0.0] * 259
    pieces += [b" ", b"a", b"b", b"ab", b"aa", b"b a", b"b ", b"<", b"s", b">", b"<s"]
    scores += [-9.0, -9.0, -9.0, -1.0, -1.0, -3.0, -2.0, -9.0, -9.0, -9.0, -1.0]
    data = b"".join(struct.pack("<fi", s, len(p)) + p for s, p in zip(scores, pieces, strict=True))
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 6) + data)
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    shown = [pieces[i].decode() for i in tokenizer.encode("aaab ab\n")]
    assert shown == [" ", "aa", "ab", " ", "ab", "<0x0A>"]
    assert [pieces[i].decode() for i in tokenizer.encode("bb a")] == [" ", "b", "b a"]
    assert [pieces[i].decode() for i in tokenizer.encode("<s>")] == [" ", "<s", ">"]  # not the special token


def test_bos_and_eos_of_tokenizer_json(sentencepiece_file, tmp_path):
    """tokenizer_config.json first, an explicit null included; config.json where it is silent."""
    path = export_tokenizer_json(sentencepiece_file, tmp_path / "tokenizer.json")

    def load():
        tokenizer = tokenizers.load_tokenizer(path)
        return tokenizer.bos_id, tokenizer.eos_id

    assert load() == (None, None)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": [8, 9]}')
    assert load() == (7, 8)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    assert load() == (None, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<none>"}')
    with pytest.raises(ValueError, match="<none>"):
        load()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizers.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        tokenizers.load_tokenizer(tmp_path)
    for content in (b"", b"plain text", b"{}", b'{"version"', bytes(range(256)) * 4, struct.pack("<i", 0)):
        bad = tmp_path / "bad.model"
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.model: not a"):
            tokenizers.load_tokenizer(bad)


def test_truncated_bin(sentencepiece_file, tmp_path):
    path = export_llama2c(sentencepiece_file, tmp_path / "tok.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="tok.bin"):
        tokenizers.load_tokenizer(path)


def test_llama2(shared_data, tmp_path):
    """Llama 2: ids that llama2.c's and llama.cpp's own tests publish, and our tokenizer.bin code on real text."""
    path = shared_data / "tokenizers/llama2/tokenizer.model"
    tokenizer = tokenizers.load_tokenizer(path.parent)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    own = tokenizers.load_tokenizer(export_llama2c(path, tmp_path / "tokenizer.bin"))
    published = {
        "I believe the meaning of life is": [306, 4658, 278, 6593, 310, 2834, 338],
        "Simply put, the theory of relativity states that ": [
            3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871,
        ],
        " this is 🦙.cpp": [29871, 445, 338, 29871, 243, 162, 169, 156, 29889, 8223],
    }  # fmt: skip
    for text, ids in published.items():
        assert tokenizer.encode(text).tolist() == ids
        assert own.encode(text).tolist() == ids
    text = corpora.load_documents(shared_data / "wikitext2/wiki.test.raw")[0]
    np.testing.assert_array_equal(own.encode(text), tokenizer.encode(text))


def test_stories260k(shared_data):
    """tok512.bin reads back the published text, and it streams."""
    tokenizer = tokenizers.load_tokenizer(shared_data / "ckpt/stories260K")
    assert tokenizer.vocab_size == 512
    text = (shared_data / "ckpt/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert tokenizer.decode([1, *ids]) == text
    assert "".join(tokenizers.stream_decode(tokenizer, ids, [1])) == text
    assert tokenizer.encode("Once upon a time").tolist() == [403, 407, 261, 378]


def test_tinystories_656k(shared_data):
    tokenizer = tokenizers.load_tokenizer(shared_data / "ckpt/TinyStories-656K")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2048, 1, 2)
    text = corpora.load_documents(shared_data / "tinystories/tinystories_train_head_2MiB.txt")[0]
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode([1, *ids, 2]) == text
    assert "".join(tokenizers.stream_decode(tokenizer, ids, [1])) == text
    # No byte fallback: an unknown character is <unk>, and is lost.
    assert tokenizer.decode(tokenizer.encode("a日b")) == "ab" and 0 in tokenizer.encode("a日b")
