"""What a word is, for every service that counts them: runs of letters and digits in lower case."""

import re

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case, without punctuation; "it's" is one."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]
