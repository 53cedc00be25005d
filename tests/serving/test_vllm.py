"""OFT adapters as requests of a real vLLM server: torch's tokens, for every adapter, in one batch."""

import copy
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.cli.command import run
from tests.cli.conftest import make_tokenizer
from tests.reference import randomize
from tests.serving.vllm_server import OpenAI, greedy, spread

pytestmark = [pytest.mark.server, pytest.mark.needs("transformers", "peft")]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [100, 200, 300, 17, 18], [33]]
ADAPTERS = {
    "peft": ({"all-linear": OFT(32)}, "peft"),
    "small-shared": ({"*_proj": OFT(16, share_input=True)}, "oftfx"),
    "exact-one-block": ({"all-linear": OFT(32, parameterization="cayley", block_share=True)}, "peft"),
    "coft-some": ({"*.v_proj": OFT(8, coft_eps=2.0), "*.up_proj": OFT(8, coft_eps=2.0)}, "peft"),
}
STD = 0.15


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base, adapters of every kind and a LoRA adapter as directories, and what torch answers with each."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = spread(LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=2, pad_token_id=0, **sizes)).eval())
    base.save_pretrained(folder / "base")
    make_tokenizer(folder / "base")
    expected = {"base": [greedy(base, p) for p in PROMPTS]}
    for seed, (name, (rules, convention)) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = randomize(oftfx.transform(base, rules), std=STD).eval()
        oftfx.save_adapter(model, folder / name, convention=convention)
        expected[name] = [greedy(model, p) for p in PROMPTS]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["q_proj", "gate_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.eval().save_pretrained(folder / "lora")
    expected["lora"] = [greedy(lora, p) for p in PROMPTS]
    # All of them say something else, so a request that got another's adapter would be seen.
    assert len({str(answers) for answers in expected.values()}) == len(expected)
    return folder, base, expected


@pytest.fixture(scope="module")
def server(made):
    folder, _, expected = made
    names = [n for n in expected if n != "base"]
    modules = " ".join(f"{name}={folder / name}" for name in names)
    options = ["--enable-lora", f"--max-loras {len(names)}", "--max-lora-rank 8", "--max-cpu-loras 8"]
    with OpenAI(folder / "base", folder, *options, f"--lora-modules {modules}") as started:
        yield started


def test_many_adapters_in_one_batch(made, server):
    """Base, four OFT adapters and LoRA, 200 requests, eight at a time, in no order."""
    _, _, expected = made
    calls = [(name, i) for name in expected for i in range(len(PROMPTS))] * 9
    random.Random(0).shuffle(calls)
    calls = calls[:200]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda call: server.complete(call[0], PROMPTS[call[1]]), calls))
    wrong = [(call, got) for call, got in zip(calls, answers, strict=True) if got != expected[call[0]][call[1]][0]]
    assert not wrong


def test_adapters_come_and_go(made, server):
    """Under another name, more of them than slots, one in the place of another, and away."""
    folder, base, expected = made
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    torch.manual_seed(50)
    model = randomize(oftfx.transform(base, {"all-linear": OFT(8)}), std=STD).eval()
    oftfx.save_adapter(model, folder / "late")
    assert [server.post(load, {"lora_name": "late", "lora_path": str(folder / "late")})[0]] == [200]
    assert server.complete("late", PROMPTS[0]) == greedy(model, PROMPTS[0])[0]
    assert server.complete("peft", PROMPTS[0]) == expected["peft"][0][0]  # it had to make room, and is back
    # Another directory under the same name.
    assert server.post(unload, {"lora_name": "late"})[0] == 200
    assert server.complete("late", PROMPTS[0])[0] == 404
    assert server.post(load, {"lora_name": "late", "lora_path": str(folder / "lora")})[0] == 200
    assert server.complete("late", PROMPTS[1]) == expected["lora"][1][0]
    assert server.post(unload, {"lora_name": "late"})[0] == 200
    assert server.complete("base", PROMPTS[2]) == expected["base"][2][0]


def unfit(folder, base):
    """Directories that must not be served, and what the answer says of each."""
    oftfx.save_adapter(randomize(oftfx.transform(base, {"*.q_proj": OFT(64)}), std=STD), folder / "large")
    yield "large", "room for blocks of 32"
    oftfx.save_adapter(randomize(oftfx.transform(base, {"lm_head": OFT(32)}), std=STD), folder / "head")
    yield "head", "lm_head"
    model = oftfx.transform(base, {"*.q_proj": OFT(32)}, train=["*.input_layernorm"])
    oftfx.save_adapter(randomize(model, std=STD), folder / "more")
    yield "more", "besides its rotations"
    shutil.copytree(folder / "peft", folder / "cut")
    whole = (folder / "peft" / "adapter_model.safetensors").read_bytes()
    (folder / "cut" / "adapter_model.safetensors").write_bytes(whole[:-100])
    yield "cut", "damaged"
    from transformers import LlamaForCausalLM

    for name, changes in (("wide", {"intermediate_size": 256}), ("deep", {"num_hidden_layers": 3})):
        config = copy.deepcopy(base.config)
        config.update(changes)
        other = LlamaForCausalLM(config)
        oftfx.save_adapter(randomize(oftfx.transform(other, {"*.down_proj": OFT(32)}), std=STD), folder / name)
    yield "wide", "turns 256 inputs, the layer has 192"
    yield "deep", "not a layer of this server's model"


def test_what_does_not_fit_is_an_error_and_the_next_request_is_served(made, server):
    folder, base, expected = made
    for name, reason in unfit(folder, base):
        status, text = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)})
        assert status >= 400, name
        assert reason in text, (name, text)
        status, text = server.complete(name, PROMPTS[0])  # never the base model's answer
        assert status == 404, name
        assert server.complete("peft", PROMPTS[0]) == expected["peft"][0][0]


def test_it_says_what_it_has_room_for(made):
    """A setting that is none stops the server at its start."""
    folder, _, _ = made
    started = OpenAI(folder / "base", folder, "--enable-lora", OFTFX_VLLM_BLOCK_SIZE="big").start(wait=False)
    try:
        assert started.process.wait(200) != 0
    finally:
        started.stop()
    assert "OFTFX_VLLM_BLOCK_SIZE='big'" in started.log.read_text()


@pytest.mark.needs("typer", "tokenizers")
def test_verify_tells_a_right_adapter_from_a_wrong_one_and_from_none(made, server):
    """``oftfx verify`` against the running server."""
    folder, _, _ = made

    def verify(adapter, *more):
        said = ["--base", folder / "base", "--adapter", folder / adapter, "--quiet", "--model", "base"]
        return run("verify", server.url, *said, "--prompt", "w1 w5 w9", "--prompt", "w30", "--tokens", "16", *more)

    done = verify("peft", "--served-adapter", "peft")
    assert (done.status, "equal: " in done.out) == (0, True), done.out
    wrong = verify("peft", "--served-adapter", "exact-one-block")
    assert wrong.status == 3
    assert "different: to 'w1 w5 w9', token " in wrong.out
    lost = verify("peft")
    assert (lost.status, "the adapter is not there" in lost.out) == (3, True)
    unknown = verify("peft", "--served-adapter", "nothing")
    assert (unknown.status, "404" in unknown.err) == (1, True)
