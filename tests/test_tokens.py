"""tokens.py: what goes in comes out, and what is lost is said."""
import warnings

import pytest
from tokenizers import Tokenizer

from tinyldm.tokens import encode, train_tokenizer

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


def test_words_beyond_the_limit_are_named():
    t = train_tokenizer(CAPTIONS)
    with pytest.warns(UserWarning, match="ignored: 'left of a red circle'"):
        y = encode(t, [CAPTIONS[1]], 4)
    assert words(t, y[0]) == ["a", "big", "blue", "square"]


def test_a_tokenizer_survives_its_json():
    t = train_tokenizer(CAPTIONS)
    assert (encode(Tokenizer.from_str(t.to_str()), CAPTIONS, 12) == encode(t, CAPTIONS, 12)).all()
