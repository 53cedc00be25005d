"""Weight formats: a layer of each is made by its package, rotated, and folded exactly and by rounding.

formats.py [NAME ...]; without names, all: none may fail, but packages may be missing.
"""

import sys

import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.formats.registry import formats
from oftfx.inspecting.installation import SHAPE, tried

wanted = sys.argv[1:]
for name in wanted or formats():
    found = tried(name)
    print(f"{name}: {found.state}: {found.remark}")
    if found.state == "missing" and not wanted:
        continue
    assert found.state == "works", found
    if name == "dense":
        continue
    layer = formats()[name].make_tiny(*SHAPE)
    model = oftfx.transform(nn.Sequential(layer), {"*": OFT(32, init="normal")}, inplace=True).eval()
    report = oftfx.fold(model, quantized="requantize").report
    assert [site.action for site in report] == ["requantized"], report
    print(f"{name}: rounding keeps {report.survival:.1%} of the update")
