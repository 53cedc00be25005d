"""Tables, pages and figures of a plan and of a fold, with nothing else installed."""

from pathlib import Path

import torch
import torch.nn as nn

import oftfx
from oftfx import OFT

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
plan = oftfx.plan(base, {"*": OFT(8)})
print(plan)
plan.to_html("plan.html")
model = oftfx.transform(base, {"*": OFT(8, init="normal")}).eval()
report = oftfx.fold(model, calibration=[(torch.randn(4, 24),)]).report
print(report)
report.to_html("fold.html")
report.save_figures("figures")
oftfx.CompareReport({"float": report, "again": report}).to_html("folds.html")
assert all(Path(page).stat().st_size > 10_000 for page in ("plan.html", "fold.html", "folds.html"))
assert {p.suffix for p in Path("figures").iterdir()} == {".svg", ".png"}
