"""The mathematics of a rotation, and the module that holds a trainable one."""

from oftfx.rotation.cayley import cayley
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation
from oftfx.rotation.rotate import rotate, rotate_weight
from oftfx.rotation.skew import skew_matrix, skew_size, skew_vector

__all__ = [
    "FrozenRotation",
    "Rotation",
    "cayley",
    "rotate",
    "rotate_weight",
    "skew_matrix",
    "skew_size",
    "skew_vector",
]
