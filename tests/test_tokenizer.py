"""data/tokenizer.py: captions become ids and back, and what is lost is reported."""
import gzip
import itertools
import json
import unicodedata
import warnings

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from tinyldm.data.prompts import clean_prompt
from tinyldm.data.tokenizer import (
    CLIP_GZ,
    LARGEST_CLIP_GZ,
    N_CLIP_MERGES,
    check_tokenizer,
    encode,
    open_vocab,
    train_tokenizer,
    wordpiece_tokenizer,
)
from tinyldm.errors import BadInput

CAPTIONS = ["a small red circle", "a big blue square left of a red circle", "a red square"]


def words(tokenizer, ids):
    return [tokenizer.id_to_token(i) for i in ids.tolist()]


def encode_silently(tokenizer, captions, M):
    """encode, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode(tokenizer, captions, M)


# ---- a vocabulary of one's own

def test_words_of_the_captions_are_single_tokens_padded_with_0():
    tokenizer = train_tokenizer(CAPTIONS)
    ids = encode_silently(tokenizer, ["A Red circle", ""], 5)
    assert words(tokenizer, ids[0]) == ["a", "red", "circle", "[PAD]", "[PAD]"]
    assert ids[1].tolist() == [0] * 5
    assert tokenizer.get_vocab_size() == 2 + 9


def test_only_pieces_that_captions_use_are_kept_so_other_words_are_unknown():
    tokenizer = train_tokenizer(CAPTIONS)
    with pytest.warns(UserWarning, match=r"\[UNK\]: 'leaf', 'purple'"):
        ids = encode(tokenizer, ["a leaf purple"], 4)
    assert words(tokenizer, ids[0]) == ["a", "[UNK]", "[UNK]", "[PAD]"]


def test_small_vocabularies_split_words_and_still_read_all_captions():
    captions = [f"word{i} again" for i in range(500)]
    tokenizer = train_tokenizer(captions, vocab_size=60)
    assert tokenizer.get_vocab_size() <= 60
    encode_silently(tokenizer, captions, 16)


def test_the_same_captions_give_the_same_vocabulary():
    """Also where pieces are equally frequent, and not all of them fit into the vocabulary."""
    captions = [f"{a}{b}{c} {c}{a}{b}" for a in "abcdefg" for b in "hijklmn" for c in "opqrstu"]
    vocabularies = {train_tokenizer(captions, vocab_size=120).to_str() for _ in range(4)}
    assert len(vocabularies) == 1


def test_of_very_many_captions_each_word_is_known():
    """Also a word that is in none of the 100,000 captions that pieces are learned from."""
    captions = ["a red car"] * 250_001
    captions[100_000] = "cared"
    tokenizer = train_tokenizer(captions)
    ids = encode_silently(tokenizer, ["cared"], 3)
    assert words(tokenizer, ids[0]) == ["car", "##e", "##d"]


def test_words_beyond_the_limit_are_named():
    tokenizer = train_tokenizer(CAPTIONS)
    with pytest.warns(UserWarning, match="ignored: 'left of a red circle'"):
        ids = encode(tokenizer, [CAPTIONS[1]], 4)
    assert words(tokenizer, ids[0]) == ["a", "big", "blue", "square"]


def test_a_tokenizer_survives_its_json():
    tokenizer = train_tokenizer(CAPTIONS)
    again = Tokenizer.from_str(tokenizer.to_str())
    assert (encode(again, CAPTIONS, 12) == encode(tokenizer, CAPTIONS, 12)).all()


def test_odd_captions_are_read_all_the_same():
    """Lone surrogates, which are no text; a million letters, of which a warning names few."""
    tokenizer = train_tokenizer([*CAPTIONS, "a \ud800 b"])
    captions = ["a \udcff circle", "x" * 10 ** 6, "a " * 10 ** 5]
    with pytest.warns(UserWarning) as warned:
        ids = encode(tokenizer, captions, 4)
    assert words(tokenizer, ids[0]) == ["a", "?", "circle", "[PAD]"]
    assert words(tokenizer, ids[2]) == ["a"] * 4
    assert len(warned) == 2
    assert all(len(str(warning.message)) < 300 for warning in warned)


# ---- vocabularies of released text encoders

def clip_vocab(folder):
    """Write a CLIP vocabulary of 4 letters and 3 merges; return the number of its tokens."""
    pieces = [
        "a", "b", "c", "d", "a</w>", "b</w>", "c</w>", "d</w>", "ab", "ab</w>", "cd</w>",
        "<|startoftext|>", "<|endoftext|>",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\nc d</w>\n")
    return len(pieces)


def test_clip_vocabulary(tmp_path):
    """Begin, words in lower case, end, padded with end; a cut keeps the end and is reported."""
    n = clip_vocab(tmp_path)
    tokenizer = open_vocab(tmp_path, n, 6)
    ids = encode(tokenizer, ["AB  cd", "", "abc\nd"], 6).tolist()
    assert ids == [
        [11, 9, 10, 12, 12, 12],
        [11, 12, 12, 12, 12, 12],
        [11, 8, 6, 7, 12, 12],
    ]
    with pytest.warns(UserWarning, match="ignored: 'd cd'"):
        assert encode(tokenizer, ["ab a b c d cd"], 6).tolist() == [[11, 9, 4, 5, 6, 12]]

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = open_vocab(tmp_path / "tokenizer.json", n, 6)
    assert encode(again, ["AB  cd"], 6).tolist() == ids[:1]


def byte_letters():
    """The letters that stand for the 256 bytes, in the order of OpenAI's bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def write_clip_gz(folder, merges):
    text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""])
    (folder / CLIP_GZ).write_bytes(gzip.compress(text.encode()))


def test_clips_one_file_is_read_as_its_two_files(tmp_path):
    """The tokens have the same numbers: bytes, bytes at the end of a word, merges, specials."""
    merges = ["a b</w>", "c d", "cd e</w>", "Ã ¤</w>"]
    letters = byte_letters()
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *[letter + "</w>" for letter in letters]]
    pieces += ["ab</w>", "cd", "cde</w>", "Ã¤</w>", "<|startoftext|>", "<|endoftext|>"]

    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (two / "vocab.json").write_text(json.dumps(vocab))
    (two / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    write_clip_gz(one, merges)

    from_two = open_vocab(two, len(pieces), 9)
    from_folder = open_vocab(one, len(pieces), 9)
    from_file = open_vocab(one / CLIP_GZ, len(pieces), 9)
    assert from_two.get_vocab() == from_file.get_vocab() == vocab
    captions = ["ab cde", "Cd ä!", "日本 \x00 ab"]
    ids = encode(from_two, captions, 9)
    assert torch.equal(encode(from_file, captions, 9), ids)
    assert torch.equal(encode(from_folder, captions, 9), ids)
    assert ids[0, :3].tolist() == [516, 512, 514]


def test_clip_has_only_the_first_merges_of_its_file(tmp_path):
    pairs = itertools.product(byte_letters(), byte_letters())
    merges = [f"{a} {b}" for a, b in itertools.islice(pairs, N_CLIP_MERGES + 9)]
    write_clip_gz(tmp_path, merges)
    tokenizer = open_vocab(tmp_path, 49_408, 77)
    assert tokenizer.token_to_id(merges[N_CLIP_MERGES - 1].replace(" ", "")) == 49_405
    assert tokenizer.token_to_id("<|endoftext|>") == 49_407


@pytest.mark.parametrize("data,message", [
    (b"\0" * (LARGEST_CLIP_GZ + 1), "too large for a vocabulary of CLIP"),
    (b"header\na b c\n", "no vocabulary of CLIP or BERT"),
    (b"header\n\xff\xff\n", "no vocabulary of CLIP or BERT")])
def test_a_compressed_file_that_is_no_vocabulary_is_refused(tmp_path, data, message):
    """Also one that would fill the memory: it is read as far as CLIP's is long."""
    (tmp_path / CLIP_GZ).write_bytes(gzip.compress(data))
    with pytest.raises(BadInput, match=f"{CLIP_GZ}: {message}"):
        open_vocab(tmp_path, 49_408, 77)


CLEANED = [
    ("a dog &amp;amp; a cat&nbsp;&#33;", "a dog & a cat !"),
    ("“It’s” ‘mine’, ‛x‟", "\"It's\" 'mine', 'x\""),
    ("ｆｕｌｌ　ｗｉｄｔｈ！", "full width!"),
    ("ﬁne oﬃce, ĳs, ŉ, ǆ", "fine office, ijs, 'n, dž"),
    (" a\tred\r\n  circle\u2028", "a red circle"),
    ("a\x00 b\ufeff\x7f", "a b"),
    ("naïve café 🙂 日本", "naïve café 🙂 日本"),
]


@pytest.mark.parametrize("prompt,plain", CLEANED)
def test_prompts_are_cleaned_as_those_of_clips_training(prompt, plain):
    assert clean_prompt(prompt) == plain


def test_only_clips_captions_are_cleaned_and_warnings_name_what_is_read(tmp_path):
    """BERT's and our own are read as they are."""
    tokenizer = open_vocab(tmp_path, clip_vocab(tmp_path), 5)
    with pytest.warns(UserWarning, match=r"ignored: 'b cd'$"):
        ids = encode(tokenizer, ["ａｂ&#32;c d b &#99;d"], 5)
    assert torch.equal(ids, encode(tokenizer, ["ab c d"], 5))

    own = train_tokenizer(["“ &amp; ”"])
    ids = encode_silently(own, ["“ &amp; ”"], 5)
    assert words(own, ids[0]) == ["“", "&", "amp", ";", "”"]


def test_bert_vocabulary(tmp_path):
    """[CLS], words, [SEP], padded with 0."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circ", "##le", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = open_vocab(tmp_path / "vocab.txt", 9, 8)
    ids = encode(tokenizer, ["A red circle!", ""], 8).tolist()
    assert ids == [[2, 4, 5, 6, 7, 8, 3, 0], [2, 3, 0, 0, 0, 0, 0, 0]]

    from_folder = open_vocab(tmp_path, 9, 8)
    assert encode(from_folder, ["red"], 8).tolist()[0][:3] == [2, 5, 3]


@pytest.mark.parametrize("pieces,message", [
    ({"[PAD]": 0, "[UNK]": 1, "a": 12}, "13 tokens, where the model's embedding has 3"),
    ({"[PAD]": 0, "a": 1, "b": 2}, "no tokenizer: WordPiece error: Missing")])
def test_ids_beyond_the_embedding_or_none_for_unknown_words_are_refused(pieces, message):
    with pytest.raises(BadInput, match=f"x.pt: {message}"):
        check_tokenizer(wordpiece_tokenizer(pieces), 3, "x.pt")
    fitting = wordpiece_tokenizer({"[PAD]": 0, "[UNK]": 1, "a": 2})
    assert check_tokenizer(fitting, 3, "x.pt") is fitting


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    n = clip_vocab(tmp_path)
    with pytest.raises(BadInput, match="13 tokens, where the model's embedding has 49408"):
        open_vocab(tmp_path, 49408, 77)
    for name, text in (("vocab.json", "{"), ("tokenizer.json", "[]"), ("vocab.txt", "a\nb")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=f"{name}: no vocabulary of CLIP or BERT"):
            open_vocab(tmp_path / name, n, 77)
    with pytest.raises(BadInput, match="missing: no vocabulary of CLIP or BERT"):
        open_vocab(tmp_path / "missing", n, 77)


MARKED_WORDS = [
    ("con ma", "con má"), ("かき", "がぎ"), ("मेज", "मज"), ("ที่", "ท"), ("Bär", "Bar"),
    ("año", "ano"), ("قَلَم", "قلم"), ("ёж", "еж"), ("한", "하"),
]


@pytest.mark.parametrize("pair", MARKED_WORDS)
def test_marks_that_change_words_are_kept(pair):
    """However they are encoded: as one character (NFC), or as letter and mark (NFD)."""
    tokenizer = train_tokenizer(list(pair))
    ids = encode_silently(tokenizer, list(pair), 6)
    assert not torch.equal(ids[0], ids[1])
    assert tokenizer.token_to_id("[UNK]") not in ids
    decomposed = [unicodedata.normalize("NFD", word) for word in pair]
    assert torch.equal(encode_silently(tokenizer, decomposed, 6), ids)


def test_more_than_100_letters_without_a_space_are_read():
    """Such a caption of training is cut into pieces, whatever its length."""
    letters = "ไก่จิกเด็กตายบนปากโอ่ง" * 20
    captions = [letters[:n] for n in (99, 100, 101, 199, 200, 201, 400)]
    tokenizer = train_tokenizer(captions, vocab_size=200)
    ids = encode_silently(tokenizer, captions, 500)
    assert tokenizer.token_to_id("[UNK]") not in ids
    assert len(torch.unique(ids, dim=0)) == len(captions)


def test_berts_own_vocabulary_strips_accents(tmp_path):
    """As its training did; it has no other words for them."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "bar", "ano"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = open_vocab(tmp_path, 6, 4)
    assert tokenizer.encode("Bär").tokens[1] == "bar"
    assert tokenizer.encode("año").tokens[1] == "ano"
