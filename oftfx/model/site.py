"""One weight of a model that can be rotated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from oftfx.formats.layout import Layout


@dataclass(frozen=True)
class Site:
    """One weight whose input (of an embedding: whose output) can be rotated.

    Attributes:
        fqn: module path of the layer; of a raw parameter its own path, ``<module>.<parameter>``.
        kind: ``"linear"``, ``"conv1d_gpt2"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, ``"conv_transpose"``,
            ``"embedding"``, ``"experts"`` or ``"functional"``.
        format: how the weight is stored, a name in `oftfx.formats.registry.formats`.
        module_class: class name of the layer.
        in_features: length of the rotated axis: input features, or patch elements ``in/groups * kernel`` of a
            convolution, or the output size of an embedding; of experts, of one. Where the outputs of a layer are
            rotated (`of_outputs`), their number.
        out_features: rows of the weight matrix; of experts, of one. Where outputs are rotated, its columns.
        dtype: float dtype of the weight, as text.
        tied: other paths of the same weight tensor.
        aliases: other paths of the same layer; rules may name any.
        is_head: the model's output layer; ``"all-linear"`` leaves it alone.
        parameter: name of the weight in its module.
        reader: path of the module that reads the weight in its forward; None where that is the layer itself.
        layout: how the stored tensor reads as matrix.
        placements: where a rotation can act, the best first: ``"activation"``, ``"weight"``.
        experts: number of experts the tensor holds; 0 for none.

    Examples:
        >>> import oftfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3, groups=2))
        >>> site = oftfx.plan(model, {"*": oftfx.OFT(9)})["0"].site
        >>> site.kind, site.in_features, site.out_features, site.placements
        ('conv2d', 27, 10, ('weight',))
    """

    fqn: str
    kind: str
    format: str
    module_class: str
    in_features: int
    out_features: int
    dtype: str
    tied: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    is_head: bool = False
    parameter: str = "weight"
    reader: str | None = None
    layout: Layout = field(default_factory=Layout)
    placements: tuple[str, ...] = ("activation",)
    experts: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether ``"all-linear"`` means this kind of layer."""
        return self.kind in ("linear", "conv1d_gpt2")

    @property
    def module(self) -> str:
        """Path of the module that holds the weight."""
        return self.fqn if self.parameter == "weight" and self.fqn != "weight" else self.fqn.rpartition(".")[0]

    @property
    def called(self) -> str:
        """Path of the module whose call uses the weight."""
        return self.module if self.reader is None else self.reader

    @property
    def weight_name(self) -> str:
        """Name of the weight among the model's parameters."""
        return f"{self.fqn}.weight" if self.module == self.fqn else self.fqn

    @property
    def is_layer(self) -> bool:
        """Whether the site is a layer that is called, not a parameter that other code reads."""
        as_layer = self.kind != "functional" and not self.turns_outputs
        return self.parameter == "weight" and self.reader is None and as_layer

    @property
    def turns_outputs(self) -> bool:
        """Whether what a layer gives out is rotated, ``W' = R^T @ W``; an embedding gives out nothing else."""
        return self.layout.stored == "outputs"

    def of_outputs(self) -> Site:
        """The same layer with its outputs to be rotated, as other tools do; its weight has to be a float one."""
        return replace(
            self,
            in_features=self.out_features,
            out_features=self.in_features,
            layout=Layout("outputs", side="output"),
            placements=("weight",),
        )
