"""TPU chips and the slices that are made of them."""

import math
import re
from dataclasses import dataclass

from flax_asr import errors


@dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
        name: as in a topology, for example `v5e`.
        flops: bf16 operations a second at peak.
        hbm_bytes: memory available to programs, as the compiler counts it.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second of one link to a neighbour, one way.
        clock_hz: clock of the matrix units, at which the peak is a whole number of operations a
            cycle.
        devices: jax devices on a chip when jax compiles for a described topology.
        axes: dimensions of the grid that slices are cut from.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock_hz: float
    devices: int
    axes: int


# Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (peak, bandwidths); the compiler's own
# message about too large a program (memory); Austin et al. 2025, "How to scale your model" (links);
# peak over operations a cycle, 8 or 4 units of 128 x 128, 4 of 256 x 256 multiply-adds (clock).
_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, int(30.5 * _GIB), 1.23e12, 4.5e10, 1.05e9, devices=2, axes=3),
        Chip("v5e", 197e12, int(15.75 * _GIB), 8.2e11, 4.5e10, 1.5e9, devices=1, axes=2),
        Chip("v5p", 459e12, int(95.74 * _GIB), 2.77e12, 9e10, 1.75e9, devices=1, axes=3),
        Chip("v6e", 918e12, int(31.25 * _GIB), 1.64e12, 9e10, 1.75e9, devices=1, axes=2),
    )
}


@dataclass(frozen=True)
class Slice:
    """A grid of chips. Figures of a *device* are its chip's, divided among the chip's devices."""

    name: str
    chip: Chip
    dims: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(self.dims)

    @property
    def flops(self) -> float:
        """Peak operations a second of a device."""
        return self.chip.flops / self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Memory of a device, in bytes."""
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes a second between a device and its memory."""
        return self.chip.hbm_bandwidth / self.chip.devices


def parse(topology: str) -> Slice:
    """The slice that a name like `v5e:2x4` describes.

    Raises:
        ConfigError: there is no such chip, or it does not come in this shape.
    """
    known = ", ".join(f"{name}:{'x'.join('224'[3 - c.axes :])}" for name, c in CHIPS.items())
    found = re.fullmatch(r"(v\d+\w*):(\d+(?:x\d+)*)", topology)
    if found is None or found[1] not in CHIPS:
        raise errors.ConfigError(
            f"--topology {topology} is not a slice that can be planned for. It is a chip and the"
            f" shape of the slice, for example {known}."
        )
    chip = CHIPS[found[1]]
    dims = tuple(int(dim) for dim in found[2].split("x"))
    if len(dims) != chip.axes or 0 in dims:
        raise errors.ConfigError(
            f"--topology {topology}: a slice of {chip.name} has {chip.axes} numbers, for example"
            f" {chip.name}:{'x'.join('224'[3 - chip.axes :])}."
        )
    return Slice(topology, chip, dims)
