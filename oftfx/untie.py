"""Tell transformers that a weight is no longer shared, or loading a saved model would share it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn


@dataclass(frozen=True)
class Untied:
    """What was shared before; `restore` shares it again.

    Attributes:
        tied: transformers' table of shared weights.
        ties_embeddings: the configuration's setting.
        replaced: parameters that got a copy of their own, by name.
    """

    tied: dict[str, str]
    ties_embeddings: bool | None
    replaced: dict[str, nn.Parameter]

    def restore(self, model: nn.Module) -> None:
        """Share them again."""
        model.all_tied_weights_keys = self.tied  # type: ignore[assignment]
        if self.ties_embeddings is not None:
            model.config.tie_word_embeddings = self.ties_embeddings  # type: ignore[union-attr]
        for name, parameter in self.replaced.items():
            _put(model, name, parameter)


def untie(model: nn.Module, name: str) -> Untied | None:
    """Take a parameter out of the model's table of shared weights; None where it is not in it.

    transformers has one switch for all of them, so whatever else was shared gets memory of its own as well: otherwise
    only one name of it would be saved, and the others start at random after loading.
    """
    config = getattr(model, "config", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict) or not any(name in pair for pair in tied.items()):
        return None
    ties = getattr(config, "tie_word_embeddings", None)
    left = {k: v for k, v in tied.items() if name not in (k, v)}
    replaced = {}
    if ties:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        kept: set[int] = set()
        for other in [n for n in parameters if n in {*tied, *tied.values()} and n != name]:
            old = parameters[other]
            if id(old) in kept:
                replaced[other] = old
                _put(model, other, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
            kept.add(id(old))
        left = {}
    model.all_tied_weights_keys = left  # type: ignore[assignment]
    return Untied(tied, ties, replaced)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
