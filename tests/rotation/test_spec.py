import pytest

from oftfx import OFT
from oftfx.errors import RuleError


@pytest.mark.parametrize(("word", "ours"), [("r", "blocks"), ("oft_block_size", "block_size"), ("coft", "coft_eps")])
def test_words_of_peft_are_answered_with_ours(word, ours):
    with pytest.raises(RuleError, match=f"no field '{word}'; PEFT's {word} is {ours}"):
        OFT(**{word: 4})
    with pytest.raises(RuleError, match="no field 'blok_size'; its fields are block_size, "):
        OFT(blok_size=4)
