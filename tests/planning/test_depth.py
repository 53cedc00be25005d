"""Depth and kind of sites, from their paths alone."""

from oftfx.planning.depth import standings


def kinds(*paths):
    return {p: s.kind for p, s in standings(paths).items()}


def test_a_decoder():
    paths = [f"model.layers.{i}.{p}" for i in range(12) for p in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
    found = standings(paths)
    assert found["model.layers.10.mlp.up_proj"].depth == 10
    assert found["model.layers.10.mlp.up_proj"].kind == "up_proj"
    assert found["model.layers.10.mlp.up_proj"].group == "model.layers.{0..11}.mlp.up_proj"
    assert (found["lm_head"].depth, found["lm_head"].kind) == (None, "lm_head")


def test_kinds_with_one_name_are_told_apart_by_what_stands_before():
    found = kinds("l.0.self.q", "l.0.cross.q", "l.1.self.q", "l.1.cross.q", "l.0.up")
    assert found == {
        "l.0.self.q": "self.q",
        "l.1.self.q": "self.q",
        "l.0.cross.q": "cross.q",
        "l.1.cross.q": "cross.q",
        "l.0.up": "up",
    }


def test_encoder_and_decoder():
    found = kinds("encoder.block.0.layer.0.Attention.q", "decoder.block.0.layer.0.Attention.q")
    assert set(found.values()) == {"encoder.….Attention.q", "decoder.….Attention.q"}


def test_paths_that_differ_in_the_place_of_a_number_only():
    found = kinds("a.0.b", "a.b.0", "a.b")
    assert len(set(found.values())) == 3


def test_numbers_alone():
    assert kinds("0", "2") == {"0": "layer", "2": "layer"}
    assert standings(["0", "2"])["2"].depth == 2
    assert standings([""])[""].kind == ""
