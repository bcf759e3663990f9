"""tokens.py: what goes in comes out, and what is lost is said."""
import json
import warnings

import pytest
from tokenizers import Tokenizer

from tinyldm import BadInput
from tinyldm.tokens import checked, encode, open_vocab, train_tokenizer, word_piece

CAPTIONS = ["a small red circle", "a big blue square left of a red circle", "a red square"]


def words(tokenizer, ids):
    return [tokenizer.id_to_token(i) for i in ids.tolist()]


def test_words_of_the_captions_are_single_tokens_padded_with_0():
    t = train_tokenizer(CAPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = encode(t, ["A Red circle", ""], 5)
    assert words(t, y[0]) == ["a", "red", "circle", "[PAD]", "[PAD]"] and y[1].tolist() == [0] * 5
    assert t.get_vocab_size() == 2 + 9


def test_only_pieces_that_captions_use_are_kept_so_other_words_are_unknown():
    t = train_tokenizer(CAPTIONS)
    with pytest.warns(UserWarning, match=r"\[UNK\]: 'leaf', 'purple'"):
        y = encode(t, ["a leaf and purple".replace("and ", "")], 4)
    assert words(t, y[0]) == ["a", "[UNK]", "[UNK]", "[PAD]"]


def test_small_vocabularies_split_words_and_still_read_all_captions():
    t = train_tokenizer([f"word{i} again" for i in range(500)], vocab_size=60)
    assert t.get_vocab_size() <= 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(t, ["word123 again"], 16)


def test_of_very_many_captions_each_word_is_known():
    captions = ["a red car"] * 250_001
    captions[100_000] = "cared"                 # none of the 100,000 that pieces are learned from
    t = train_tokenizer(captions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words(t, encode(t, ["cared"], 3)[0]) == ["car", "##e", "##d"]


def test_words_beyond_the_limit_are_named():
    t = train_tokenizer(CAPTIONS)
    with pytest.warns(UserWarning, match="ignored: 'left of a red circle'"):
        y = encode(t, [CAPTIONS[1]], 4)
    assert words(t, y[0]) == ["a", "big", "blue", "square"]


def test_a_tokenizer_survives_its_json():
    t = train_tokenizer(CAPTIONS)
    assert (encode(Tokenizer.from_str(t.to_str()), CAPTIONS, 12) == encode(t, CAPTIONS, 12)).all()


def clip_vocab(folder):
    """A CLIP vocabulary of 4 letters and 3 merges, the ids in this order."""
    pieces = [*"abcd", "a</w>", "b</w>", "c</w>", "d</w>", "ab", "ab</w>", "cd</w>",
              "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\nc d</w>\n")
    return len(pieces)


def test_clip_vocabulary(tmp_path):
    """BOS words EOS, lower-cased, padded with EOS; cut text is named; EOS survives the cut."""
    n = clip_vocab(tmp_path)
    t = open_vocab(tmp_path, n, 6)
    y = encode(t, ["AB  cd", "", "abc\nd"], 6).tolist()
    assert y == [[11, 9, 10, 12, 12, 12], [11, 12, 12, 12, 12, 12], [11, 8, 6, 7, 12, 12]]
    with pytest.warns(UserWarning, match="ignored: 'd cd'"):
        assert encode(t, ["ab a b c d cd"], 6).tolist() == [[11, 9, 4, 5, 6, 12]]
    t.save(str(tmp_path / "tokenizer.json"))
    again = open_vocab(tmp_path / "tokenizer.json", n, 6)
    assert encode(again, ["AB  cd"], 6).tolist() == y[:1]


def test_bert_vocabulary(tmp_path):
    """[CLS] words [SEP], padded with 0."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circ", "##le", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    t = open_vocab(tmp_path / "vocab.txt", 9, 8)
    assert encode(t, ["A red circle!", ""], 8).tolist() == [[2, 4, 5, 6, 7, 8, 3, 0],
                                                            [2, 3, 0, 0, 0, 0, 0, 0]]
    assert encode(open_vocab(tmp_path, 9, 8), ["red"], 8).tolist()[0][:3] == [2, 5, 3]


def test_odd_captions_are_read_all_the_same():
    """Lone surrogates, which are no text; a million letters, named in short."""
    t = train_tokenizer([*CAPTIONS, "a \ud800 b"])
    with pytest.warns(UserWarning) as w:
        y = encode(t, ["a \udcff circle", "x" * 10 ** 6, "a " * 10 ** 5], 4)
    assert words(t, y[0]) == ["a", "?", "circle", "[PAD]"] and words(t, y[2]) == ["a"] * 4
    assert len(w) == 2 and all(len(str(v.message)) < 300 for v in w)


@pytest.mark.parametrize("pieces,say", [
    ({"[PAD]": 0, "[UNK]": 1, "a": 12}, "13 tokens, where the model's embedding has 3"),
    ({"[PAD]": 0, "a": 1, "b": 2}, "no tokenizer: WordPiece error: Missing")])
def test_a_tokenizer_with_ids_beyond_the_embedding_or_none_for_the_unknown_is_refused(pieces, say):
    with pytest.raises(BadInput, match=say):
        checked(word_piece(pieces), 3, "--ckpt x")
    checked(word_piece({"[PAD]": 0, "[UNK]": 1, "a": 2}), 3, "--ckpt x")


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    n = clip_vocab(tmp_path)
    with pytest.raises(BadInput, match="13 tokens, where the model's embedding has 49408"):
        open_vocab(tmp_path, 49408, 77)
    for name, text in (("vocab.json", "{"), ("tokenizer.json", "[]"), ("vocab.txt", "a\nb")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match="no vocabulary of CLIP or BERT"):
            open_vocab(tmp_path / name, n, 77)
    with pytest.raises(BadInput, match="--vocab"):
        open_vocab(tmp_path / "missing", n, 77)
