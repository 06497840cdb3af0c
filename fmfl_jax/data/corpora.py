"""Text corpora: files and folders of text as lists of documents, and the English text that ships with CPython.

Text is read as UTF-8, with line ends "\\n" on every platform.
"""

import json
import pathlib
import re

import numpy as np

_SUFFIXES = (".txt", ".tokens", ".raw", ".md", ".jsonl")
_SEPARATOR = "<|endoftext|>"
# A title " = Title = " stands between empty lines; without that rule lines of formulas (" = 1 <unk> and <unk> C = ")
# would begin articles. Sections are " = = Section = = ".
_WIKI_TITLE = re.compile(r"(?:(?<=\n \n)|(?<=\n\n)) = (?!= )[^\n]* = \n(?= ?\n)")


def load_documents(path: str | pathlib.Path) -> list[str]:
    """The documents of a text file, or of every .txt, .tokens, .raw, .md and .jsonl file of a folder, by file name.

    WikiText files (.tokens, .raw) are cut before each article's title, and nothing is left out: the documents joined
    are the text. A .jsonl file has one document per line, its field "text"; a .tsv file one per line (see
    `load_labeled_tsv`). Another text is cut at <|endoftext|> (the marks, and the white space around them, are left
    out), or is one document: an empty line parts paragraphs, not documents.

    Raises:
      FileNotFoundError: no such file or folder, or no text file in the folder.
      ValueError: a file that is empty, is not UTF-8, or is not of the format its name says.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file()), key=lambda f: f.name)
        if not files:
            looked_for = " ".join("*" + suffix for suffix in _SUFFIXES)
            raise FileNotFoundError(f"{path}: no text in this folder (looked for {looked_for})")
        return [document for file in files for document in load_documents(file)]
    if path.suffix == ".tsv":
        return load_labeled_tsv(path)[0]
    text = _read_text(path)
    if path.suffix == ".jsonl":
        return _split_jsonl(path, text)
    if path.suffix in (".tokens", ".raw"):
        return _split_wikitext(text)
    if _SEPARATOR in text:
        documents = [part.strip() for part in text.split(_SEPARATOR)]
        documents = [document for document in documents if document]
        if not documents:
            raise ValueError(f"{path}: only {_SEPARATOR} marks, no text")
        return documents
    return [text]


def load_labeled_tsv(path: str | pathlib.Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts with class labels, one `text<TAB>label` per line (AG News).

    Returns:
      (texts, labels, label_names): labels is int32 [num_texts], labels[i] the place of text i's label in label_names,
      which is sorted, so that files with the same classes number them alike.
    """
    path = pathlib.Path(path)
    texts, names = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        text, _, label = line.rpartition("\t")
        if not text.strip() or not label.strip():
            raise ValueError(f"{path}, line {number}: expected text<TAB>label")
        texts.append(text)
        names.append(label.strip())
    label_names, labels = np.unique(np.asarray(names), return_inverse=True)
    return texts, labels.astype(np.int32), label_names.tolist()


def python_topics() -> list[str]:
    """The help texts of the Python language that ship with CPython, sorted by key: English, without repetitions.

    Of Python 3.12's 79 texts, 0.49 MB, this keeps 57, 0.40 MB: the others stand almost word for word in longer ones
    ("try" in "compound", "customization" in "specialnames"), so that a part held out for evaluation would have been
    seen in training. Left out is every text of which more than half stands, paragraph by paragraph, in longer ones.
    The text differs a little from one Python version to the next.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise FileNotFoundError("this Python has no pydoc_data.topics (CPython's help): give a text of your own") from e
    kept, seen = [], set()
    for key in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[key].split("\n\n")]
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * repeated <= sum(map(len, paragraphs)):
            kept.append(key)
            seen.update(paragraphs)
    return [topics[key] for key in sorted(kept)]


def split_documents(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Parts the documents at random in two, the first with `fraction` of all bytes.

    In a shuffled order, each document that still fits into the first part goes there. Both parts have at least one
    document and keep the documents' order.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}: expected a number between 0 and 1")
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} document cannot be split in two")
    sizes = [num_bytes(document) for document in documents]
    room = fraction * sum(sizes)
    first = set()
    for i in np.random.default_rng(seed).permutation(len(documents)).tolist():
        if sizes[i] <= room:
            first.add(i)
            room -= sizes[i]
    first = first or {int(np.argmin(sizes))}
    parts = [[document for i, document in enumerate(documents) if (i in first) == here] for here in (True, False)]
    return parts[0], parts[1]


def num_bytes(text: str) -> int:
    """The length of the text in UTF-8, the denominator of bits per byte."""
    return len(text.encode("utf-8"))


def _read_text(path: pathlib.Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of text")
    try:
        # "utf-8-sig" drops the mark that some Windows editors put first.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text (byte {e.start} is {e.object[e.start]:#04x})") from e
    if not text.strip():
        raise ValueError(f"{path}: the text is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split_wikitext(text: str) -> list[str]:
    """Cuts before each article's title; what stands before the first title belongs to the first article."""
    first_character = len(text) - len(text.lstrip())
    titles = [match.start() for match in _WIKI_TITLE.finditer(text) if match.start() > first_character]
    return [text[start:end] for start, end in zip([0] + titles, titles + [len(text)], strict=True)]


def _split_jsonl(path: pathlib.Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: not JSON ({e})") from e
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a string "text"')
        if record["text"]:
            documents.append(record["text"])
    if not documents:
        raise ValueError(f'{path}: every "text" is empty')
    return documents
