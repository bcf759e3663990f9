"""Prompts for CLIP, cleaned as the captions of its training were.

Source: basic_clean and whitespace_clean in the simple_tokenizer.py of OpenAI's CLIP, and
        the characters that chardata.py of the package ftfy lists, which they call.
"""
import html
import unicodedata


def clean_prompt(prompt: str) -> str:
    """Return a prompt as OpenAI's tokenizer of CLIP cleans it.

    HTML's entities become characters; curly quotes, full-width letters and ligatures
    become plain ones; control characters go; spaces and lines become single spaces.

    NB: ftfy also repairs text that was decoded in a wrong encoding, such as "dÃ©jÃ vu"
    for "déjà vu", and removes the colour codes of terminals. That is left out here.
    """
    text = html.unescape(html.unescape(prompt))
    text = text.translate(PLAIN)
    return " ".join(text.split())


def plain_characters() -> dict[int, str]:
    """Return what takes the place of each character that is not plain, by code point."""
    plain = {}

    # Letters of full or half width and the wide space; then Latin ligatures.
    variants = [0x3000, *range(0xFF01, 0xFFF0)]
    variants += [*range(0xFB00, 0xFB07), 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]
    for code in variants:
        plain[code] = unicodedata.normalize("NFKC", chr(code))

    # Curly quotes, single and double; the last is the ligature of an apostrophe and n.
    plain |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
    plain |= dict.fromkeys(range(0x201C, 0x2020), '"')
    plain[0x149] = "'n"

    # Control characters, except for tab and the ends of lines; marks that nobody sees.
    control = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F]
    unseen = [*range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    plain |= dict.fromkeys([*control, *unseen], "")
    return plain


PLAIN = plain_characters()
