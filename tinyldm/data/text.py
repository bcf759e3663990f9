"""Text files as people have them: which bytes are text, and where a line ends."""


def decode_text(data: bytes) -> str:
    """Return the text of a file that is UTF-8, with or without a byte-order mark.

    Raises ValueError for anything else. Why not guess: text in another encoding would
    become other words, and a model would learn them.
    """
    message = "is not UTF-8 text; save it as UTF-8"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(message) from error

    # UTF-16 without a mark is valid UTF-8 as far as its letters are English.
    if "\0" in text:
        raise ValueError(message)
    return text


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end at a line feed, alone or after a return.

    Why not str.splitlines: it also splits at U+2028 and other characters that a caption
    may have.
    """
    return [line.removesuffix("\r") for line in text.split("\n")]
