"""Tokens as a person reads them."""

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ESCAPE = re.compile(r"(\\x[89a-f][0-9a-f])")


def display_strings(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of each token id, leading space kept; bytes that are no whole UTF-8 character shown as `\\xe2`.

    Ids that the tokenizer does not know (padding of the embedding) give an empty string.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
    added, byte_level = set(tokenizer.get_added_vocab()), "Ġ" in tokenizer.get_vocab()
    strings = []
    for piece in pieces:
        if piece is None or piece in added:
            strings.append(piece or "")
        else:
            raw = _byte_level(piece) if byte_level else _sentencepiece(piece)
            strings.append(raw.decode("utf-8", errors="backslashreplace"))
    return strings + [""] * (vocab_size - len(strings))


def shown_bytes(string: str) -> bytes:
    """The bytes behind a display string, so that characters that tokens cut can be put together again."""
    return b"".join(
        bytes.fromhex(part[2:]) if _ESCAPE.fullmatch(part) else part.encode("utf-8", "replace")
        for part in _ESCAPE.split(string)
    )


def _byte_level(piece: str) -> bytes:
    table = _byte_of_character()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)


def _sentencepiece(piece: str) -> bytes:
    if match := _BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace("▁", " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
