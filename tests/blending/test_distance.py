import json
import math

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.blending.test_blend import at, dense, dense_log, made, nearest


def test_the_distance_is_the_norm_of_the_logarithm():
    model = made(OFT(3, parameterization="cayley"))
    oftfx.add_adapter(model, "b", {"0": OFT(4)})
    torch.nn.init.normal_(model[0].oft.b.skew, std=0.2)
    report = oftfx.adapter_distance(model, "a", "b")
    a, b = dense(model[0].oft.a), nearest(dense(model[0].oft.b))
    first, second = report
    assert (first.fqn, first.block_size, second.fqn, second.block_size) == ("0", 12, "2", 3)
    expected = float(dense_log(a.T @ b).norm())
    assert abs(first.distance - expected) < 1e-12
    assert abs(first.first - float(dense_log(a).norm())) < 1e-12
    assert abs(first.second - float(dense_log(b).norm())) < 1e-12
    assert abs(first.relative - expected / float(dense_log(a).norm() + dense_log(b).norm())) < 1e-12
    alone = float(dense_log(dense(at(model, "2", "a"))).norm())
    assert (second.second, second.relative) == (0.0, 1.0)
    assert abs(second.distance - alone) < 1e-12
    assert abs(report.distance - math.hypot(expected, alone)) < 1e-12
    back = oftfx.adapter_distance(model, "b", "a")
    assert abs(back.distance - report.distance) < 1e-12


@pytest.mark.parametrize(("weight", "relative"), [(0.5, 1 / 3), (1.0, 0.0), (-1.0, 1.0), (0.0, 1.0)])
def test_along_one_way_the_distance_is_the_difference_of_strengths(weight, relative):
    model = made(OFT(4, parameterization="cayley"))
    oftfx.blend(model, {"a": weight}, into="b")
    report = oftfx.adapter_distance(model, "a", "b")
    for site in report:
        assert abs(site.distance - abs(1 - weight) * site.first) < 1e-13
        assert abs(site.relative - relative) < 1e-12
    assert abs(report.relative - relative) < 1e-12


def test_two_that_do_nothing_are_not_apart():
    model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 3)), {"*": OFT(3)})
    report = oftfx.adapter_distance(model, "default", "default")
    assert (report.distance, report.relative) == (0.0, 0.0)
    assert json.loads(report.to_json())["sites"][0]["relative"] == 0.0
    assert "relative" in report.table()
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        oftfx.adapter_distance(model, "default", "x")
