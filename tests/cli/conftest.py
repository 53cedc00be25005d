"""A base with its tokenizer, texts and an adapter, on disk."""

import json
from types import SimpleNamespace

import pytest

from oftfx import OFT
from tests.streaming.compare import adapter_for


def make_tokenizer(path, template=None):
    """Words w0 to w127 after <unk>, <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = template
    wrapped.save_pretrained(path)
    return wrapped


@pytest.fixture
def files(tiny_llama, tmp_path):
    """Directories ``base`` and ``adapter``, and ``texts``: sentences in which a word decides the next."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    make_tokenizer(tmp_path / "base")
    adapter = adapter_for(tiny_llama(), tmp_path / "adapter", {"all-linear": OFT(16)})
    texts = tmp_path / "texts.jsonl"
    lines = [" ".join(f"w{(3 * i + 7 * k) % 29}" for k in range(40)) for i in range(60)]
    texts.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return SimpleNamespace(base=tmp_path / "base", adapter=adapter, texts=texts, out=tmp_path / "out", tmp=tmp_path)
