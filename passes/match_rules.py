"""Resolve rules to sites: the first rule that matches a site decides what happens to it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch.nn as nn

from oftfx.errors import RuleError
from oftfx.formats.exact import choose_kernel
from oftfx.formats.sharded import WHOLE, cut_of
from oftfx.model.site import Site
from oftfx.model.sites import choose_placement, output_head
from oftfx.model.structure import is_own_module
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.planning.rules import Rule
from oftfx.planning.site_plan import SitePlan, Skipped
from oftfx.planning.unreachable import unreachable
from oftfx.rotation.spec import OFT


class MatchRules(Pass):
    """Make the plan. Nothing in the model changes.

    Args:
        rules: in the order they are asked.
        train: names or globs of modules that train whole.
        train_bias: ``"none"``, ``"all"`` or ``"oft"`` (biases of the rotated layers).

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import MatchRules, Program
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> step = MatchRules([oftfx.Rule("1", None), oftfx.Rule("*", oftfx.OFT(3))])
        >>> plan = step.run(Program.of(model)).program.planned
        >>> [site.fqn for site in plan], [(skipped.fqn, skipped.reason) for skipped in plan.skipped]
        (['0'], [('1', "excluded by '1'")])
    """

    name = "match_rules"
    preserves = "exact"
    after = ("find_functional",)  # which makes sites of weights that only a recording shows

    def __init__(self, rules: Sequence[Rule], *, train: Sequence[str] = (), train_bias: str = "none") -> None:
        self.rules, self.train, self.train_bias = tuple(rules), tuple(train), train_bias

    def run(self, program: Program) -> PassResult:
        """Match every rule with every site.

        Raises:
            RuleError: a rule matches nothing, or a block size does not divide; with all such sites at once.
        """
        modules = program.index.modules
        hits = [0] * len(self.rules)
        wins = [0] * len(self.rules)
        entries, skipped = list[SitePlan](), list[Skipped]()
        faults = dict[str, list[str]]()  # by what is wrong, the sites
        for site in program.sites:
            matching = [i for i, r in enumerate(self.rules) if r.matches(site, modules[site.module])]
            for index in matching:
                hits[index] += 1
            if not matching:
                if site.is_head and site.is_linear and any(r.target == "all-linear" for r in self.rules):
                    reason = "the output head; 'all-linear' leaves it alone, name it to rotate it"
                    skipped.append(Skipped(site.fqn, site.module_class, reason))
                continue
            wins[matching[0]] += 1
            rule = self.rules[matching[0]]
            if rule.spec is None:
                skipped.append(Skipped(site.fqn, site.module_class, f"excluded by {rule.label!r}"))
                continue
            try:
                entries.append(_entry(site, rule, rule.spec, modules[site.module]))
            except RuleError as fault:
                faults.setdefault(str(fault).removeprefix(f"{site.fqn}: "), []).append(site.fqn)
        if faults:
            raise RuleError("\n".join(f"{_some(sites)}: {fault}" for fault, sites in faults.items()))
        unfit = self._reached_without_site(program, modules, hits, wins)
        skipped += [s for found in unfit.values() for s in found]
        self._check_hits(program, hits, unfit)
        self._check_wins(hits, wins)
        whole = self._trained_modules(modules, entries)
        plan = Plan(
            type(program.model).__name__,
            tuple(entries),
            tuple(skipped),
            train=self._trained_names(program, whole, entries),
            train_modules=whole,
            train_bias=self.train_bias,
            train_buffers=_inside(whole, modules, "_buffers"),
        )
        changes = [Change(e.fqn, "planned") for e in entries]
        changes += [Change(s.fqn, "skipped", s.reason, refused=True) for s in skipped]
        return PassResult(program.with_(plan=plan), plan != program.plan, tuple(changes))

    def check(self, result: Program) -> None:
        """There is a plan."""
        _ = result.planned

    def _reached_without_site(
        self, program: Program, modules: dict[str, nn.Module], hits: list[int], wins: list[int]
    ) -> dict[int, list[Skipped]]:
        """By rule, weight matrices that it names but that cannot be rotated.

        Raises:
            RuleError: of one of them this process has a part only.
        """
        found, cut = dict[int, list[Skipped]](), dict[str, list[str]]()
        head = output_head(program.model)
        for path, holder, reason in unreachable(program):
            module = modules[holder]
            for index, rule in enumerate(self.rules):
                by_class = isinstance(rule.target, type) and isinstance(module, rule.target)
                if rule.target == "all-linear" and cut_of(module):  # a site of such a layer would have said it
                    by_class = isinstance(module, nn.Linear) and module is not head
                if rule.matches_name(path) or rule.matches_name(holder) or by_class:
                    hits[index] += rule.spec is None
                    wins[index] += rule.spec is None
                    if rule.spec is not None and (how := cut_of(module)):  # left out, little would be rotated
                        cut.setdefault(how, []).append(path)
                    elif rule.spec is not None:
                        found.setdefault(index, []).append(Skipped(path, type(module).__name__, reason))
                    break
        if cut:
            raise RuleError("\n".join([*(f"{_some(paths)}: {how}" for how, paths in cut.items()), WHOLE]))
        return found

    def _check_hits(self, program: Program, hits: list[int], unfit_by_rule: dict[int, list[Skipped]]) -> None:
        for index, rule in enumerate(self.rules):
            if hits[index] or rule.optional:
                continue
            if unfit := unfit_by_rule.get(index):
                raise RuleError(
                    f"rule {rule.label!r} matches {len(unfit)} layers, none of which can be rotated, e.g. "
                    f"{unfit[0].fqn} ({unfit[0].module_class}): {unfit[0].reason}"
                )
            raise RuleError(
                f"rule {rule.label!r} matches no layer of {type(program.model).__name__}. {_nearest(rule, program)}"
                "Use Rule(..., optional=True) where that is intended"
            )

    def _check_wins(self, hits: list[int], wins: list[int]) -> None:
        for index, rule in enumerate(self.rules):
            if hits[index] and not wins[index] and not rule.optional:
                earlier = ", ".join(repr(r.label) for r in self.rules[:index])
                raise RuleError(
                    f"rule {rule.label!r} decides nothing: the first match wins, and earlier rules ({earlier}) match "
                    "all its layers. Move it up, or use Rule(..., optional=True)"
                )

    def _trained_modules(self, modules: dict[str, nn.Module], entries: list[SitePlan]) -> tuple[str, ...]:
        whole: dict[str, None] = {}
        for wanted in self.train:
            rule = Rule(wanted, None)
            # PEFT's modules_to_save names the last part of a path; so may this.
            found = [n for n in modules if n and (rule.matches_name(n) or n == wanted or n.endswith("." + wanted))]
            found = [n for n in found if not is_own_module(modules[n])]
            if not found:
                close = difflib.get_close_matches(wanted, list(modules), 3, 0.4)
                raise RuleError(f"train: no module {wanted!r}. Nearest: {', '.join(close) or 'none'}")
            for fqn in found:
                taken = [e.fqn for e in entries if e.fqn == fqn or e.fqn.startswith(fqn + ".")]
                if taken:
                    raise RuleError(
                        f"train: {fqn} trains whole, but rules also rotate {taken[0]} in it; exclude it by a rule "
                        f"({taken[0]!r}: None)"
                    )
                whole[fqn] = None
        return tuple(whole)

    def _trained_names(self, program: Program, whole: Sequence[str], entries: list[SitePlan]) -> tuple[str, ...]:
        modules = program.index.modules
        names = dict.fromkeys(_inside(whole, modules, "_parameters"))
        if self.train_bias not in ("none", "all", "oft"):
            raise RuleError(f"train_bias: got {self.train_bias!r}, expected 'none', 'all' or 'oft'")
        if self.train_bias == "all":
            names.update((n, None) for n, *_ in program.index.names.values() if n.endswith("bias"))
        elif self.train_bias == "oft":
            names.update((f"{e.fqn}.bias", None) for e in entries if modules[e.fqn]._parameters.get("bias") is not None)
        return tuple(names)


def _inside(whole: Sequence[str], modules: dict[str, nn.Module], kind: str) -> tuple[str, ...]:
    """Names of the tensors of a kind in these modules, but for those of rotations that other adapters have there."""
    holders = {p: m for fqn in whole for p, m in modules[fqn].named_modules(prefix=fqn) if not is_own_module(m)}
    tensors = ((path, *item) for path, module in holders.items() for item in vars(module)[kind].items())
    return tuple(f"{path}.{name}" for path, name, tensor in tensors if tensor is not None)


def _entry(site: Site, rule: Rule, spec: OFT, module: nn.Module) -> SitePlan:
    placement = choose_placement(site, spec)
    blocks, block_size = spec.geometry(site.in_features, site.fqn, _patch(site, module))
    notes = []
    if spec.asked not in (block_size, blocks):
        notes.append(f"size {spec.asked} does not divide {site.in_features}; the nearest that does is used")
    if block_size == 1:
        notes.append("blocks of one element: nothing to train; choose a size that divides")
    if site.tied:
        notes.append(f"weight shared with {', '.join(site.tied)}; folding gives this layer a weight of its own")
    kernel, note = choose_kernel(module, spec.kernel) if site.is_layer else ("native", "")
    if note:
        notes.append(note)
    if spec.experts == "each" and site.experts:
        blocks *= site.experts
    return SitePlan(
        site,
        spec,
        blocks,
        block_size,
        rule.label,
        owner=site.fqn,
        notes=tuple(notes),
        placement=placement,
        kernel=kernel,
    )


def _patch(site: Site, module: nn.Module) -> str:
    """What the rotated axis of a convolution is made of, for a message."""
    kernel = getattr(module, "kernel_size", ())
    if not isinstance(kernel, tuple) or math.prod(kernel) <= 1 or site.in_features % math.prod(kernel):
        return ""
    sizes = " x ".join(map(str, kernel))
    return f" ({site.in_features // math.prod(kernel)} channels of a group x kernel {sizes})"


def _some(sites: Sequence[str]) -> str:
    """The first of several, and how many more."""
    return sites[0] + (f" and {len(sites) - 1} more" if sites[1:] else "")


def _nearest(rule: Rule, program: Program) -> str:
    names = [s.fqn for s in program.sites]
    if not names and isinstance(program.model, nn.Linear):
        return "The model is itself the layer; wrap it: nn.Sequential(model). "
    if not names:
        return "The model has no layer that can be rotated. "
    if not isinstance(rule.target, str):
        classes = sorted({s.module_class for s in program.sites})
        return f"Its {len(names)} layers that can be rotated are of class {classes}. "
    plain = rule.target.removeprefix("re:").replace(".*", "*").strip("*.$^")
    ends = sorted({n.rsplit(".", 1)[-1] for n in names})
    if plain in ends:
        return f"Did you mean '*.{plain}'? "
    close = difflib.get_close_matches(plain, ends, 3, 0.5) or difflib.get_close_matches(plain, names, 3, 0.3)
    suggestions = [f"*.{c}" if c in ends else c for c in close] or [f"*.{e}" for e in ends[:5]]
    return f"Nearest: {', '.join(suggestions)}. "
