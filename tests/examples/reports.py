"""Look at a fold: its verdict, a page, a comparison of policies, a model card, figures for a paper."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).save_pretrained("float")
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained("float", quantization_config=four_bits, dtype=torch.float32)
model = oftfx.transform(base, {"all-linear": OFT(32)}).eval()
for parameter in oftfx.adapter_parameters(model):
    torch.nn.init.normal_(parameter, std=0.01)  # instead of training
batches = [{"input_ids": torch.randint(96, (4, 32))} for _ in range(4)]

# --8<-- [start:verdict]
result = oftfx.fold(model, quantized="requantize", calibration=batches)
verdict = result.report.verdict  # .state "green", "amber", "red", "nothing", "unknown"; .share; .measure
print(verdict.sentence)
result.report.to_html("fold.html")
result.report.save_figures("figures")  # SVG and PNG
# --8<-- [end:verdict]

# --8<-- [start:compare]
reports = {policy: oftfx.fold(model, quantized=policy, calibration=batches).report for policy in ("keep", "calibrate")}
comparison = oftfx.CompareReport({"requantize": result.report, **reports})
comparison.to_html("folds.html")
print(comparison.best)  # the smallest in which the adapter arrived
# --8<-- [end:compare]

# --8<-- [start:card]
folder = result.save("folded")
card = oftfx.model_card(folder, base_model="org/base", license="apache-2.0", language=["en"])
(folder / "README.md").write_text(card, encoding="utf-8")
later = oftfx.FoldReport.from_json((folder / "oftfx_fold.json").read_text())  # a page can be made from it at any time
# --8<-- [end:card]

assert verdict.measure == "model outputs"
assert verdict.share < comparison.reports["keep"].verdict.share
assert later == result.report
assert f"{verdict.share:.1%}" in card
assert {Path("figures/survival.svg"), Path("figures/error.png")} <= {*Path("figures").iterdir()}
assert f"{verdict.share:.1%}" in Path("fold.html").read_text()
