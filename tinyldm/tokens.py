"""From captions to token ids: a WordPiece tokenizer trained on the captions of the training set.

Paper:   App. E.2.1 (the released model uses BERT's WordPiece vocabulary, Stable Diffusion CLIP's).
Shapes:  n captions -> ids (n, M) int64; 0 = [PAD], which is also all there is of the empty caption.
Reads:   nothing of ours."""
import warnings
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tinyldm import require, trying

PAD, UNK = "[PAD]", "[UNK]"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"           # CLIP's

def word_piece(pieces: dict[str, int]) -> Tokenizer:
    """BERT's kind, of lower case: each word is cut into the longest pieces that there are."""
    t = Tokenizer(models.WordPiece(pieces, unk_token=UNK))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return t

def plain(caption: str) -> str:
    """Without lone surrogates, and no longer than M tokens can say."""
    return caption[:9_999].encode("utf8", "replace").decode()

def train_tokenizer(captions: list[str], vocab_size: int = 8192) -> Tokenizer:
    """Learn at most vocab_size pieces from the captions, lower-cased; keep those that they use.
    Of very many captions it learns from some 100,000, evenly spaced, but looks at each word.
    Dropping the unused pieces makes every word that training cannot teach an [UNK], which `encode`
    reports, where letters would spell it silently with embeddings that stay random."""
    captions = [*map(plain, captions)]
    full = word_piece({UNK: 0})
    full.train_from_iterator(captions[::-(-len(captions) // 100_000)], trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, UNK], show_progress=False))
    words = sorted({word for text in captions for word in text.split()})
    used = {piece for e in full.encode_batch(words) for piece in e.tokens} - {PAD, UNK}
    return word_piece({piece: i for i, piece in enumerate([PAD, UNK, *sorted(used)])})

def encode(tokenizer: Tokenizer, captions: list[str], M: int) -> torch.Tensor:
    """ids (n, M), padded with 0. Warns of words cut off at M tokens and of unknown words."""
    rows = torch.zeros(len(captions), M, dtype=torch.int64)
    captions = [*map(plain, captions)]
    cut, unknown = {}, {}
    for row, text, e in zip(rows, captions, tokenizer.encode_batch(captions)):
        row[:len(e.ids[:M])] = torch.tensor(e.ids[:M], dtype=torch.int64)
        if len(e.ids) > M:
            cut[text[e.offsets[M][0]:]] = None
        elif e.overflowing:                                         # of open_vocab's tokenizers
            cut[text[min(a for a, b in e.overflowing[0].offsets if b):]] = None
        unknown |= {text[a:b]: None for (a, b), piece in zip(e.offsets, e.tokens) if piece == UNK}
    for words, say in ((cut, f"prompts are limited to {M} tokens, so these words are ignored: "),
                       (unknown, "words that no training caption has are read as [UNK]: ")):
        if words:
            more = f" and {len(words) - 8} more" if len(words) > 8 else ""
            warnings.warn(say + ", ".join(repr(w[:80]) for w in [*words][:8]) + more, stacklevel=2)
    return rows

def bert(vocab: Path) -> Tokenizer:
    """bert-base-uncased's: a piece a line; [CLS] words [SEP]."""
    pieces = {line: i for i, line in enumerate(vocab.read_text("utf8").splitlines())}
    t = word_piece(pieces)
    t.post_processor = processors.BertProcessing(*((s, pieces[s]) for s in ("[SEP]", "[CLS]")))
    return t

def clip(folder: Path) -> Tokenizer:
    """CLIP's byte pairs, of vocab.json and merges.txt; lower case; BOS words EOS."""
    t = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                       unk_token=EOS, end_of_word_suffix="</w>"))
    t.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.post_processor = processors.BertProcessing(*((s, t.token_to_id(s)) for s in (EOS, BOS)))
    return t

def checked(t: Tokenizer, n_vocab: int, where: str) -> Tokenizer:
    """t, if its ids are 0..n_vocab-1, as the embedding's, with one for all else. Or BadInput."""
    with trying(f"{where}: no tokenizer"):
        t.encode("\U0002a700")                          # a rare ideograph
        n = 1 + max(t.get_vocab().values())
    require(n == n_vocab, f"{where}: {n} tokens, where the model's embedding has {n_vocab}")
    return t

def open_vocab(path: Path, n_vocab: int, M: int) -> Tokenizer:
    """A released text encoder's tokenizer; it cuts, and pads to M: CLIP's with EOS, BERT's with 0.
    path: vocab.txt, tokenizer.json, or a folder with one of them or with vocab.json and merges.txt.
    Raises BadInput, also where it has not n_vocab tokens, as the embedding of the model has."""
    files = [path / f for f in ("vocab.json", "vocab.txt", "tokenizer.json")]
    file = next((f for f in files if f.exists()), files[0]) if path.is_dir() else path
    with trying(f"--vocab {file}: no vocabulary of CLIP or BERT"):
        if file.name == "vocab.json":
            t = clip(file.parent)
        else:
            t = bert(file) if file.suffix == ".txt" else Tokenizer.from_file(str(file))
    t = checked(t, n_vocab, f"--vocab {file}")
    pad = EOS if t.token_to_id(EOS) is not None else PAD
    t.enable_truncation(M)
    t.enable_padding(length=M, pad_id=t.token_to_id(pad) or 0, pad_token=pad)
    return t
