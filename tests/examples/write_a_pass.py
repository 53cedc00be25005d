"""A pass of one's own: what it declares, what it returns, and what the manager holds against it."""

import torch
import torch.nn as nn

import oftfx
from oftfx.errors import PassError

# --8<-- [start:pass]
from oftfx.passes import Change, Pass, PassManager, PassResult, Program


class MergeDropout(Pass):
    """Replace every Dropout by an Identity: in eval mode it computes nothing else."""

    name = "merge_dropout"  # a verb phrase, used in errors and reports
    preserves = "exact"  # or "rounding", or "lossy"
    after = ("insert_rotations",)  # if that is in the same pipeline at all

    def run(self, program: Program) -> PassResult:
        """Change the model, and say of each site what was done, or why not."""
        changes = []
        for path, module in list(program.model.named_modules()):
            if not isinstance(module, nn.Dropout):
                continue
            if module.training:
                changes.append(Change(path, "replace", "it is in training mode", refused=True))
                continue
            parent, _, child = path.rpartition(".")
            setattr(program.model.get_submodule(parent), child, nn.Identity())
            changes.append(Change(path, "replaced by Identity"))
        return PassResult(program, any(not c.refused for c in changes), tuple(changes))

    def check(self, result: Program) -> None:
        """The post-condition, on the result."""
        for path, module in result.model.named_modules():
            if isinstance(module, nn.Dropout) and not module.training:
                raise PassError(f"{path} is still a Dropout")


# --8<-- [end:pass]

# --8<-- [start:run]
base = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 8)).eval()
model = oftfx.transform(base, {"*": oftfx.OFT(8)})
x = torch.randn(5, 32)
before = model(x)
outcome = PassManager([MergeDropout()], verify=(x,)).run(Program.of(model))
for change in outcome.changes:
    print(change.site, change.action, change.reason)
# --8<-- [end:run]

assert outcome.modified
assert isinstance(model[1], nn.Identity)
assert torch.equal(model(x), before)


class Liar(MergeDropout):
    """Says that it changed nothing."""

    def run(self, program: Program) -> PassResult:
        """Do it, and deny it."""
        return PassResult(super().run(program).program, modified=False)


again = oftfx.transform(base, {"*": oftfx.OFT(8)})
found = ""
try:
    PassManager([Liar()]).run(Program.of(again))
except PassError as error:
    found = str(error)
assert "says modified=False" in found, "the manager believed a pass that was not honest"
