"""Say in the plan how many bytes of weight matrices it reaches, and name those it does not."""

from __future__ import annotations

from dataclasses import replace

from oftfx.model.index import ModelIndex
from oftfx.model.names import read_as
from oftfx.model.structure import is_own_module
from oftfx.passes.protocol import Pass, PassResult
from oftfx.planning.coverage import Coverage, Unreached
from oftfx.planning.program import Program
from oftfx.planning.unreachable import is_matrix

_Matrix = tuple[list[str], tuple[int, ...], int]


class MeasureCoverage(Pass):
    """Fill in ``plan.coverage``: bytes, not modules. The experts of a layer are one module and most of a model.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import MatchRules, MeasureCoverage, PassManager, Program
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> passes = [MatchRules([oftfx.Rule("0", oftfx.OFT(3))]), MeasureCoverage()]
        >>> coverage = PassManager(passes).run(Program.of(model)).program.planned.coverage
        >>> coverage.share, [weight.name for weight in coverage.unreached]
        (0.6, ['1.weight'])
    """

    name = "measure_coverage"
    preserves = "exact"
    after = ("match_rules", "share_inputs")

    def run(self, program: Program) -> PassResult:
        """Measure."""
        plan = program.planned
        planned = {e.site.weight_name for e in plan}
        sizes = _matrices(program.index)
        reached = {i for i, (names, _, _) in sizes.items() if planned & set(names)}
        coverage = Coverage(
            sum(sizes[i][2] for i in reached),
            sum(size for _, _, size in sizes.values()),
            tuple(Unreached(names[0], shape, size) for i, (names, shape, size) in sizes.items() if i not in reached),
        )
        result = replace(plan, coverage=coverage)
        return PassResult(program.with_(plan=result), result != plan)


def _matrices(index: ModelIndex) -> dict[int, _Matrix]:
    """``{id: (names, shape, bytes)}`` of every weight matrix; a packed one goes by its layer and real size."""
    found: dict[int, _Matrix] = {}
    for module, paths in index.paths.items():
        if is_own_module(module):
            continue
        weight_format = index.format_of(module)
        if weight_format is not None and not weight_format.lossless:
            shape = weight_format.geometry(module)
            names = [f"{path}.weight" for path in paths]
            found[id(module)] = (names, (shape.out_features, shape.in_features), weight_format.nbytes(module))
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and is_matrix(parameter) and not name.endswith("bias"):
                entry: _Matrix = ([], tuple(parameter.shape), parameter.numel() * parameter.element_size())
                mine = found.setdefault(id(parameter), entry)[0]
                mine += [read_as(f"{path}.{name}" if path else name) for path in paths]
    return found
