"""How MaxText will cut each leaf over the chips that load it.

MaxText gives each axis of a leaf a logical name (`Leaf.axes`). Its logical axis rules say over which axes of the mesh
an axis of that name is cut, and its flags (`--ici_fsdp_parallelism=16`) how long each axis of the mesh is. The rules
are data, of each release: `configs/maxtext/logical_axis_rules`.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

from slicecast.configs import maxtext
from slicecast.convert.box import Shape
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping.target import Leaf

# The axis `stage` has another name in MaxText's flags.
_FLAG_OF_AXIS = {"stage": "pipeline"}

# Leaves shown that cannot be cut; with a wrong mesh there are many.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class AxisRules:
    """MaxText's logical axis rules.

    Attributes:
        mesh_axes: The axes of a mesh.
        rules: Logical names, and the axes of the mesh over which they are cut, in order of precedence.
    """

    mesh_axes: tuple[str, ...]
    rules: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Sharding:
    """How leaves are cut over a mesh.

    Attributes:
        mesh: The sizes of the mesh's axes; those that are not there are 1.
        rules: Which axes of leaves they cut.
    """

    mesh: Mapping[str, int]
    rules: AxisRules

    def partition_spec(self, leaf: Leaf) -> tuple[tuple[str, ...], ...]:
        """The axes of the mesh over which each axis of a leaf is cut.

        As in Flax: the rules are gone through in their order, and one counts if its logical name has none yet and none
        of its mesh axes is taken, whatever their sizes. As in MaxText, axes of size 1 are left out in the end.
        """
        spec: dict[str, tuple[str, ...]] = {}
        taken: set[str] = set()
        for name, mesh_axes in self.rules.rules:
            if name in leaf.axes and name not in spec and taken.isdisjoint(mesh_axes):
                spec[name] = mesh_axes
                taken.update(mesh_axes)
        return tuple(
            tuple(axis for axis in spec.get(name or "", ()) if self.mesh.get(axis, 1) > 1) for name in leaf.axes
        )

    def parts(self, leaf: Leaf) -> Shape:
        """Into how many parts each axis of a leaf is cut."""
        return tuple(math.prod(self.mesh[axis] for axis in mesh_axes) for mesh_axes in self.partition_spec(leaf))

    def check(self, leaves: Iterable[Leaf]) -> None:
        """Checks that the parts of each leaf are equal, as JAX wants them.

        Raises:
            TargetError: If they are not: MaxText could not load the leaf.
        """
        wrong = [
            f"'{leaf.path}' is {list(leaf.shape)}, in {list(self.parts(leaf))} parts"
            for leaf in leaves
            if any(size % parts for size, parts in zip(leaf.shape, self.parts(leaf), strict=True))
        ]
        if wrong:
            axes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
            raise TargetError(
                f"a mesh of {axes} does not divide {len(wrong)} leaves, and MaxText refuses to load them: "
                f"{'; '.join(wrong[:_SHOWN])}. Give the --ici_*_parallelism and --dcn_*_parallelism of a mesh on which "
                "the model fits, or none of them."
            )


@functools.cache
def axis_rules(version: str = maxtext.VERSION, model_name: str | None = None) -> AxisRules:
    """The rules of a MaxText release. Some models have their own in place of those for the same logical name."""
    file = resources.files(maxtext) / "logical_axis_rules" / f"{version}.json"
    content = json.loads(file.read_text())
    own = content["models"].get(model_name, [])
    replaced = {name for name, _ in own}
    rules = [rule for rule in content["logical_axis_rules"] if rule[0] not in replaced] + own
    return AxisRules(tuple(content["mesh_axes"]), tuple((name, tuple(axes)) for name, axes in rules))


def flags() -> dict[str, str]:
    """MaxText's flags for the sizes of a mesh, and the axis that each is for."""
    return {
        f"{network}_{_FLAG_OF_AXIS.get(axis, axis)}_parallelism": axis
        for network in ("ici", "dcn")
        for axis in axis_rules().mesh_axes
    }


def mesh(parallelism: Mapping[str, int]) -> dict[str, int]:
    """The mesh that MaxText makes of its flags: within a slice (`ici`) times over slices (`dcn`)."""
    axes = flags()
    sizes = dict.fromkeys((axes[flag] for flag in parallelism), 1)
    for flag, size in parallelism.items():
        sizes[axes[flag]] *= size
    return sizes
