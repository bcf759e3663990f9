"""From captions to token ids: a WordPiece tokenizer trained on the captions of the training set.

Paper: App. E.2.1 (the released model has BERT's WordPiece vocabulary, Stable Diffusion CLIP's).
Shapes: n captions -> ids (n, M) int64; 0 = [PAD], M times where empty. Reads: nothing of ours."""
import warnings
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tinyldm import require, trying

PAD, UNK, BOS, EOS = "[PAD]", "[UNK]", "<|startoftext|>", "<|endoftext|>"       # BOS, EOS: CLIP's

def word_piece(pieces: dict[str, int]) -> Tokenizer:
    """BERT's kind, of lower case: each word is cut into the longest pieces that there are."""
    t = Tokenizer(models.WordPiece(pieces, unk_token=UNK))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return t

def plain(caption: str) -> str:
    """Without lone surrogates, and no longer than M tokens can say."""
    return caption[:9_999].encode("utf8", "replace").decode()

def train_tokenizer(captions: list[str], vocab_size: int = 8192) -> Tokenizer:
    """Learn at most vocab_size pieces from the captions (some 100,000 of very many), lower-cased;
    keep those used by any: a word that training cannot teach is [UNK], and `encode` reports it."""
    captions = [*map(plain, captions)]
    full = word_piece({UNK: 0})
    full.train_from_iterator(captions[::-(-len(captions) // 100_000)], trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, UNK], show_progress=False))
    words = sorted({word for text in captions for word in text.split()})
    used = {piece for e in full.encode_batch(words) for piece in e.tokens} - {PAD, UNK}
    return word_piece({piece: i for i, piece in enumerate([PAD, UNK, *sorted(used)])})

def encode(tokenizer: Tokenizer, captions: list[str], M: int) -> torch.Tensor:
    """ids (n, M), padded with 0. Warns of words cut off at M tokens and of unknown words."""
    captions, ids, cut, unknown = [*map(plain, captions)], [], {}, {}
    for text, e in zip(captions, tokenizer.encode_batch(captions)):
        ids.append((e.ids + [0] * M)[:M])
        over = e.offsets[M:] + [v for part in e.overflowing[:1] for v in part.offsets]
        if starts := [a for a, b in over if b]:                     # overflowing: of open_vocab's
            cut[text[min(starts):]] = None
        unknown |= {text[a:b]: None for (a, b), piece in zip(e.offsets, e.tokens) if piece == UNK}
    for words, say in ((cut, f"prompts are limited to {M} tokens, so these words are ignored: "),
                       (unknown, "words that no training caption has are read as [UNK]: ")):
        if words:
            more = f" and {len(words) - 8} more" if len(words) > 8 else ""
            warnings.warn(say + ", ".join(repr(w[:80]) for w in [*words][:8]) + more, stacklevel=2)
    return torch.tensor(ids)

def checked(t: Tokenizer, n_vocab: int, where: str) -> Tokenizer:
    """t, if its ids are 0..n_vocab-1, as the embedding's, with one for all else. Or BadInput."""
    with trying(f"{where}: no tokenizer"):
        t.encode("\U0002a700")                          # a rare ideograph
        n = 1 + max(t.get_vocab().values())
    require(n == n_vocab, f"{where}: {n} tokens, where the model's embedding has {n_vocab}")
    return t

def open_vocab(path: Path, n_vocab: int, M: int) -> Tokenizer:
    """A released text encoder's tokenizer; it cuts, and pads to M: CLIP's with EOS, BERT's with 0.
    path: vocab.txt (BERT's, a piece a line), tokenizer.json, or a folder with one of them or with
    vocab.json and merges.txt (CLIP's). Raises BadInput, also where it has not n_vocab tokens."""
    files = [path / f for f in ("vocab.json", "vocab.txt", "tokenizer.json")]
    file = next(filter(Path.exists, files), files[0]) if path.is_dir() else path
    with trying(f"--vocab {file}: no vocabulary of CLIP or BERT"):
        if file.name == "vocab.json":                   # CLIP's byte pairs, of lower case
            t, ends = Tokenizer(models.BPE.from_file(
                str(file), str(file.with_name("merges.txt")),
                unk_token=EOS, end_of_word_suffix="</w>")), (EOS, BOS)
            t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(
                Regex(r"\s+"), " "), normalizers.Lowercase()])
            words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
            t.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(words), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        elif file.suffix == ".txt":
            t, ends = word_piece(models.WordPiece.read_file(str(file))), ("[SEP]", "[CLS]")
        else:                                           # it says itself what stands at its ends
            t, ends = Tokenizer.from_file(str(file)), ()
        if ends:
            t.post_processor = processors.BertProcessing(*((s, t.token_to_id(s)) for s in ends))
    t = checked(t, n_vocab, f"--vocab {file}")
    pad = EOS if t.token_to_id(EOS) is not None else PAD
    t.enable_truncation(M)
    t.enable_padding(length=M, pad_id=t.token_to_id(pad) or 0, pad_token=pad)
    return t
