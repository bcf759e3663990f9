"""From captions to token ids: a WordPiece tokenizer trained on the captions of the training set.

Paper:   App. E.2.1 (the released model uses BERT's WordPiece vocabulary).
Shapes:  n captions -> ids (n, M) int64; 0 = [PAD], which is also all there is of the empty caption.
Reads:   nothing of ours.
"""
import warnings

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

PAD, UNK = "[PAD]", "[UNK]"


def train_tokenizer(captions: list[str], vocab_size: int = 8192) -> Tokenizer:
    """Learn at most vocab_size pieces from the captions, lower-cased; keep those that they use.

    Dropping the unused pieces makes every word that training cannot teach an [UNK], which `encode`
    reports, where letters would spell it silently with embeddings that stay random.
    """
    def blank(vocab):
        t = Tokenizer(models.WordPiece(vocab, unk_token=UNK))
        t.normalizer = normalizers.BertNormalizer()
        t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return t
    full = blank({UNK: 0})
    full.train_from_iterator(captions, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, UNK], show_progress=False))
    used = {piece for e in full.encode_batch(captions) for piece in e.tokens} - {PAD, UNK}
    return blank({piece: i for i, piece in enumerate([PAD, UNK, *sorted(used)])})


def encode(tokenizer: Tokenizer, captions: list[str], M: int) -> torch.Tensor:
    """ids (n, M), padded with 0. Warns of words cut off at M tokens and of unknown words."""
    rows = torch.zeros(len(captions), M, dtype=torch.int64)
    cut, unknown = {}, {}
    for row, text, e in zip(rows, captions, tokenizer.encode_batch(captions)):
        row[:len(e.ids[:M])] = torch.tensor(e.ids[:M], dtype=torch.int64)
        if len(e.ids) > M:
            cut[text[e.offsets[M][0]:]] = None
        unknown |= {text[a:b]: None for (a, b), piece in zip(e.offsets, e.tokens) if piece == UNK}
    if cut:
        warnings.warn(f"prompts are limited to {M} tokens, so these words are ignored: "
                      + brief(cut), stacklevel=2)
    if unknown:
        warnings.warn("words that no training caption has are read as [UNK]: " + brief(unknown),
                      stacklevel=2)
    return rows


def brief(words) -> str:
    """At most eight quoted words, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - 8} more" if len(words) > 8 else ""
    return ", ".join(map(repr, words[:8])) + more
