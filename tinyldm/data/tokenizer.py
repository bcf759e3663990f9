"""From captions to token ids, with a vocabulary learned from the training captions.

Paper:  App. E.2.1. The text-to-image model has BERT's WordPiece vocabulary, Stable
        Diffusion has CLIP's byte pairs; open_vocab reads either.
Shapes: n captions -> ids (n, M) int64. Id 0 is [PAD], so an empty caption is M zeros.
"""
import gzip
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import (
    Encoding,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from tinyldm.data.prompts import clean_prompt
from tinyldm.errors import require, trying

# Special tokens, here and in BERT's vocabulary; then those of CLIP's.
PAD = "[PAD]"
UNK = "[UNK]"
CLIP_BEGIN = "<|startoftext|>"
CLIP_END = "<|endoftext|>"
CLIP_BYTE_PAIRS = {"unk_token": CLIP_END, "end_of_word_suffix": "</w>"}

# CLIP's vocabulary as the code of OpenAI and open_clip ships it, in one file.
CLIP_GZ = "bpe_simple_vocab_16e6.txt.gz"
N_CLIP_MERGES = 49_152 - 256 - 2        # the file lists more, which CLIP does not have
LARGEST_CLIP_GZ = 10_000_000            # bytes of its text, which has 3 million

MAX_LETTERS = 9_999         # of a caption: many more than the M tokens that are read
MAX_LEARNED_FROM = 100_000  # captions from which the pieces of words are learned
MAX_WORD = 100              # letters; longer words are read in parts
MAX_NAMED = 8               # words that a warning names


# ---- a vocabulary of one's own

def train_tokenizer(captions: list[str], vocab_size: int = 8192) -> Tokenizer:
    """Learn a WordPiece vocabulary of at most vocab_size pieces from captions.

    Only the pieces that some caption uses are kept. Why: training teaches nothing about
    the others. A word that needs one is read as [UNK], and `encode` warns of it.
    """
    captions = [clean_text(caption) for caption in captions]
    words = set()
    for caption in captions:
        words.update(caption.split())
    words = sorted(words)

    # Learn the pieces; of very many captions, some are enough. Why the trainer is given
    # all single letters: on its own it numbers them in random order, and where two
    # pieces are as frequent, their numbers decide which one is kept.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, UNK, *single_letters(words)],
        show_progress=False,
    )
    learner = wordpiece_tokenizer({UNK: 0})
    every = -(-len(captions) // MAX_LEARNED_FROM)
    learner.train_from_iterator(captions[::every], trainer)
    learned = wordpiece_tokenizer(learner.get_vocab())

    # Keep the pieces that the words need.
    used = set()
    for encoding in learned.encode_batch(words):
        used.update(encoding.tokens)
    pieces = [PAD, UNK, *sorted(used - {PAD, UNK})]
    return wordpiece_tokenizer({piece: i for i, piece in enumerate(pieces)})


def single_letters(words: list[str]) -> list[str]:
    """Return the letters of words as pieces: x, and ##x where it continues a word."""
    blank = wordpiece_tokenizer({UNK: 0})
    letters = set()
    continuing = set()
    for word in words:
        normal = blank.normalizer.normalize_str(word)
        for part, _ in blank.pre_tokenizer.pre_tokenize_str(normal):
            letters.update(part)
            continuing.update(part[1:])
    return sorted(letters) + ["##" + letter for letter in sorted(continuing)]


def wordpiece_tokenizer(pieces: dict[str, int]) -> Tokenizer:
    """Return a tokenizer of BERT's kind: lower case, words cut into longest pieces.

    Unlike BERT's own, it keeps accents and other marks, which change words: Bar and Bär,
    ga and ka in Japanese, vowels in Hindi. Of two ways to encode a marked letter, it takes
    the one with fewer characters (NFC). It reads letters without a space in parts of
    MAX_WORD, where BERT's reads more than 100 as [UNK]. Why: some languages have no spaces.
    """
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=UNK))
    keep_marks = normalizers.BertNormalizer(clean_text=False, strip_accents=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), keep_marks])

    part_of_word = Regex(f".{{{MAX_WORD}}}")
    cut_long_words = pre_tokenizers.Split(part_of_word, "isolated")
    into_words = pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([into_words, cut_long_words])
    return tokenizer


def clean_text(caption: str) -> str:
    """Return a caption of sane length, without lone surrogates (which are not text)."""
    return caption[:MAX_LETTERS].encode("utf8", "replace").decode()


def cleaned(tokenizer: Tokenizer, captions: list[str]) -> list[str]:
    """Return captions as this tokenizer's own training had them.

    CLIP's captions were cleaned, see clean_prompt; all others are only made text.
    """
    captions = [clean_text(caption) for caption in captions]
    if is_clip(tokenizer):
        captions = [clean_prompt(caption) for caption in captions]
    return captions


# ---- captions to ids

def encode(tokenizer: Tokenizer, captions: list[str], M: int) -> Tensor:
    """Return the ids (n, M) of captions, padded with 0.

    Warns of words that are cut off after M tokens, and of words that are read as [UNK].
    """
    captions = cleaned(tokenizer, captions)
    ids = []
    cut_off = []
    unknown = []
    for caption, encoding in zip(captions, tokenizer.encode_batch(captions)):
        padded = encoding.ids + [0] * M
        ids.append(padded[:M])
        cut_off += text_cut_off(caption, encoding, M)
        unknown += unknown_words(caption, encoding)

    limit = f"prompts are limited to {M} tokens, so these words are ignored"
    warn_of_words(limit, cut_off)
    warn_of_words("words that no training caption has are read as [UNK]", unknown)
    return torch.tensor(ids)


def text_cut_off(caption: str, encoding: Encoding, M: int) -> list[str]:
    """Return, in a list, the end of a caption that the first M tokens do not reach."""
    # The (start, end) of each further token in the caption. The tokenizers of
    # open_vocab cut by themselves, and keep the rest in `overflowing`.
    spans = list(encoding.offsets[M:])
    for rest in encoding.overflowing[:1]:
        spans += rest.offsets

    # Special tokens are nowhere in the caption: their span is (0, 0).
    starts = [start for start, end in spans if end > 0]
    return [caption[min(starts):]] if starts else []


def unknown_words(caption: str, encoding: Encoding) -> list[str]:
    """Return the parts of a caption that are read as [UNK]."""
    unknown = []
    for (start, end), token in zip(encoding.offsets, encoding.tokens):
        if token == UNK:
            unknown.append(caption[start:end])
    return unknown


def warn_of_words(message: str, words: Iterable[str]) -> None:
    """Warn of words, if there are any; a warning names the first few, each once."""
    words = list(dict.fromkeys(words))
    if not words:
        return
    named = ", ".join(repr(word[:80]) for word in words[:MAX_NAMED])
    n_more = len(words) - MAX_NAMED
    more = f" and {n_more} more" if n_more > 0 else ""
    warnings.warn(f"{message}: {named}{more}", stacklevel=3)


# ---- vocabularies of released text encoders

def open_vocab(path: Path, n_vocab: int, M: int) -> Tokenizer:
    """Open the tokenizer of a released text encoder; it makes M tokens of any caption.

    path: a file, or the folder that holds it: vocab.txt (BERT's: one piece per line),
    vocab.json with merges.txt beside it (CLIP's), bpe_simple_vocab_16e6.txt.gz (CLIP's in
    one file), or tokenizer.json. CLIP pads with its end token, BERT with 0.

    Raises BadInput for another file, and if there are not n_vocab tokens.
    """
    file = vocab_file(path)
    with trying(f"{file}: no vocabulary of CLIP or BERT"):
        if file.name == "vocab.json":
            tokenizer = clip_tokenizer(read_clip_files(file))
        elif file.suffix == ".gz":
            tokenizer = clip_tokenizer(read_clip_gz(file))
        elif file.suffix == ".txt":
            tokenizer = bert_tokenizer(file)
        else:
            tokenizer = Tokenizer.from_file(str(file))
    check_tokenizer(tokenizer, n_vocab, str(file))

    pad = CLIP_END if is_clip(tokenizer) else PAD
    pad_id = tokenizer.token_to_id(pad) or 0
    tokenizer.enable_truncation(M)
    tokenizer.enable_padding(length=M, pad_id=pad_id, pad_token=pad)
    return tokenizer


def is_clip(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is CLIP's, by its special tokens."""
    return tokenizer.token_to_id(CLIP_END) is not None


def check_tokenizer(tokenizer: Tokenizer, n_vocab: int, source: str) -> Tokenizer:
    """Return the tokenizer, if its ids are the rows of an embedding of n_vocab tokens.

    source: where the tokenizer comes from, for messages. Raises BadInput if the number
    of tokens differs, or if the tokenizer fails at words that it does not know.
    """
    rare_ideograph = "\U0002a700"
    with trying(f"{source}: no tokenizer"):
        tokenizer.encode(rare_ideograph)
        n_found = 1 + max(tokenizer.get_vocab().values())
    require(
        n_found == n_vocab,
        f"{source}: {n_found} tokens, where the model's embedding has {n_vocab}",
    )
    return tokenizer


def vocab_file(path: Path) -> Path:
    """Return the file of a vocabulary: path itself, or the first in the folder path."""
    if not path.is_dir():
        return path
    names = ("vocab.json", "vocab.txt", CLIP_GZ, "tokenizer.json")
    files = [path / name for name in names]
    for file in files:
        if file.exists():
            return file
    return files[0]


def read_clip_files(file: Path) -> models.BPE:
    """Return CLIP's byte pairs, of vocab.json and the merges.txt beside it."""
    merges = file.with_name("merges.txt")
    return models.BPE.from_file(str(file), str(merges), **CLIP_BYTE_PAIRS)


def read_clip_gz(file: Path) -> models.BPE:
    """Return CLIP's byte pairs, of one compressed file: a line to ignore, then merges.

    The tokens are numbered as in OpenAI's code: letters for the 256 bytes, the same at
    the end of a word, what each merge makes, and the two special tokens.
    Raises BadInput for a file that is much larger than CLIP's.
    """
    with gzip.open(file) as compressed:
        text = compressed.read(LARGEST_CLIP_GZ + 1)
    require(len(text) <= LARGEST_CLIP_GZ, f"{file}: too large for a vocabulary of CLIP")
    lines = text.decode("utf8").strip().split("\n")
    merges = [tuple(line.split()) for line in lines[1:1 + N_CLIP_MERGES]]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += [first + second for first, second in merges]
    pieces += [CLIP_BEGIN, CLIP_END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return models.BPE(vocab, merges, **CLIP_BYTE_PAIRS)


def clip_tokenizer(byte_pairs: models.BPE) -> Tokenizer:
    """Return CLIP's tokenizer: byte pairs, lower case."""
    tokenizer = Tokenizer(byte_pairs)

    single_spaces = normalizers.Replace(Regex(r"\s+"), " ")
    steps = [normalizers.NFC(), single_spaces, normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)

    # A word is an English ending, letters, one digit, or other characters.
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    into_words = pre_tokenizers.Split(words, "removed", invert=True)
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([into_words, into_bytes])

    add_ends(tokenizer, CLIP_BEGIN, CLIP_END)
    return tokenizer


def bert_tokenizer(file: Path) -> Tokenizer:
    """Return BERT's tokenizer, of vocab.txt: a piece's id is the number of its line.

    It is uncased, so it strips accents, as in BERT's own training.
    """
    pieces = models.WordPiece.read_file(str(file))
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    add_ends(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def add_ends(tokenizer: Tokenizer, begin: str, end: str) -> None:
    """Let every caption begin and end with these special tokens."""
    tokenizer.post_processor = processors.BertProcessing(
        (end, tokenizer.token_to_id(end)),
        (begin, tokenizer.token_to_id(begin)),
    )
