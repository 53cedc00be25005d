"""Small tokenizers of the two kinds that GGUF holds, trained on a text here."""

import json

TEXT = [
    "The quick brown fox jumps over the lazy dog 1234 times; it's what they've done, isn't it? Grüße aus Köln!\n\n",
    "  def indented(code):\treturn code  # with   blanks\n 今日は, naïve café — 10,000 €",
]
AWKWARD = [
    *TEXT,
    "",
    " ",
    "a  b   c",
    "12 34567 x1y2",
    "don't DON'T",
    "ỹ zalgo\u0301 🙂🙃",
    "the\r\n\tthe \n",
    "<s> the </s>",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]


def bytes_as_letters(size, *, digits=True):
    """GPT-2's kind, with every digit alone as in SmolLM's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters]) if digits else letters
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT * 2, trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1,
    ))  # fmt: skip
    return fast(made)


def pieces(size, *, closed=True):
    """SentencePiece's kind, as converted for transformers: every way to make a piece is a merge (``closed``)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = Tokenizer(models.BPE())
    made.normalizer = steps
    made.train_from_iterator(TEXT * 2, trainers.BpeTrainer(vocab_size=size - 256, show_progress=False))
    model = json.loads(made.to_str())["model"]
    merged = ["".join(m) for m in model["merges"]]
    letters = [t for t in model["vocab"] if t not in merged]
    tokens = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *letters, *merged][:size]
    known, merges = set(tokens[260:]), []
    for (left, right), piece in zip(model["merges"], merged, strict=True):
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece))] if closed else [(left, right)]
        merges += [(a, b) for a, b in ways if a in known and b in known and piece in known]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True,
                                byte_fallback=True))  # fmt: skip
    made.normalizer = steps
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    return fast(made)


def fast(made):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
