"""How a call is laid out on a GPU: tiles, who holds what, and how many programs there are. Integers only.

Everything that the result for a column depends on follows from the length of a column and the order of its elements in
memory, never from how many columns there are.
"""

from __future__ import annotations

from typing import NamedTuple

from normwise.kernels.geometry import Geometry, Weights


class Device(NamedTuple):
    """What matters of a GPU."""

    processors: int
    cache: int  # bytes of its last cache


class Limits(NamedTuple):
    """What layouts follow from: numbers of elements, unless something else is said."""

    held: int = 16384  # of a tile of the forward: one program holds columns up to this
    held_back: int = 4096  # of the backward, whose sums for parameters take registers as well
    divided: int = 4096  # of a tile of longer columns
    beside: int = 32  # columns side by side that make whole sectors of memory
    least: int = 1024  # that keep a program busy
    parts: int = 128  # of a column, at most
    joined: int = 2048  # parts of the columns of a block, at most: one program joins them
    to_a_thread: int = 8
    turns: int = 8  # blocks of long columns of which one program adds up what they say of parameters
    share: int = 4  # groups of blocks, with what is written of them, that the last cache has room for


LIMITS = Limits()  # chosen by registers, spills and width of loads; not by measurement yet


class View(NamedTuple):
    """A geometry as the kernels see it: rows of one run are numbered by k, whatever numbers them in the geometry."""

    sizes: tuple[int, int, int, int]
    weights: Weights


class Tile(NamedTuple):
    """What a program holds at a time: R x K x S elements, each a power of two."""

    r: int
    k: int
    s: int


class Layout(NamedTuple):
    """How columns are divided."""

    tile: Tile
    warps: int  # of 32 threads, for a tile
    tiles: int  # of a part
    parts: int  # of a column; 1, with 1 tile, if a program holds it

    @property
    def registers(self) -> int:
        """That a thread may have at most. Not told, the compiler may spill some to run one more program beside."""
        return min(2**16 // (32 * self.warps), 255)

    @property
    def joined_at_once(self) -> int:
        """Parts that a program joins at a time: no fewer than it has threads, each of which then has few of them."""
        return max(power_of_two(self.parts), 32 * self.warps // self.tile.k)

    @property
    def is_resident(self) -> bool:
        """Whether one program holds whole columns."""
        return self.parts == self.tiles == 1


class Grid(NamedTuple):
    """How blocks of K columns are shared out."""

    k0: int
    beside: int  # for each place of k0
    loop: int  # blocks that a program of the backward takes in turn, to add up what they say of parameters
    per_group: int  # blocks of which a second look finds the elements in the cache

    @property
    def blocks(self) -> int:
        """How many."""
        return self.k0 * self.beside

    @property
    def slots(self) -> int:
        """Programs of the backward for each place of k0, if a column has one part."""
        return -(-self.beside // self.loop)

    def tickets(self, parts: int) -> int:
        """Programs of a launch that measures parts and then comes back to them: see divided.py."""
        groups = -(-self.blocks // self.per_group)
        return (2 * groups + 2) * self.per_group * parts


def view_of(geometry: Geometry) -> View:
    """The geometry, with k0 moved to k1 where a column is one run."""
    k0, r0, k1, r1 = geometry.sizes
    weights = geometry.weights
    if r0 == 1 and k1 == 1:
        moved = weights._replace(period_k0=1, k0=0, period_k1=weights.period_k0, k1=weights.k0)
        return View((1, 1, k0, r1), moved)
    return View(geometry.sizes, weights)


def layout_of(r0: int, r1: int, limits: Limits = LIMITS, *, backward: bool) -> Layout:
    """For columns of r0 runs of r1 elements.

    >>> layout_of(1, 4096, backward=False)
    Layout(tile=Tile(r=1, k=1, s=4096), warps=16, tiles=1, parts=1)
    >>> layout_of(256, 56 * 56, backward=False)  # batch norm of 256 images
    Layout(tile=Tile(r=1, k=1, s=4096), warps=16, tiles=2, parts=128)
    """
    r, s = power_of_two(r0), power_of_two(r1)
    k = limits.beside if r1 == 1 else max(limits.beside * 4 // s, 1)
    while r1 != 1 and r * k * s < limits.least:
        k *= 2
    if r * k * s <= (limits.held_back if backward else limits.held):
        return Layout(Tile(r, k, s), _warps(r * k * s, limits), 1, 1)
    s = min(s, max(limits.divided // k, 1))
    r = min(r, max(limits.divided // (k * s), 1))
    tiles = -(-r0 // r) * -(-r1 // s)
    each = -(-tiles // max(min(limits.parts, limits.joined // k), 1))
    return Layout(Tile(r, k, s), _warps(r * k * s, limits), each, -(-tiles // each))


def _warps(elements: int, limits: Limits) -> int:
    """How many share a tile's elements; 32 is the most that a program can have."""
    return min(max(elements // (32 * limits.to_a_thread), 1), 32)


def grid_of(
    view: View, layout: Layout, device: Device, itemsize: int, limits: Limits = LIMITS, *, adds_up: bool
) -> Grid:
    """For all columns; `adds_up`: gradients of parameters are wanted."""
    k0, r0, k1, r1 = view.sizes
    beside = -(-k1 // layout.tile.k)
    loop = 1
    if adds_up and k0 == r0 == 1 and not view.weights.k1:
        busy = -(-beside // (device.processors * 4))
        loop = busy if layout.is_resident else min(busy, limits.turns)
    block = layout.tile.k * r0 * r1 * itemsize
    per_group = max(device.cache // limits.share // block, -(-device.processors * 2 // layout.parts), 1)
    return Grid(k0, beside, loop, -(-min(per_group, k0 * beside) // loop) * loop)


def sums_shape(view: View, layout: Layout, grid: Grid) -> tuple[int, int, int, int, int]:
    """Of what tiles leave of a parameter's gradient: (k0, slots, r, k, s), 1 where the parameter does not run along.

    Tiles of the same place of k0 that say something of the same parameters have a slot each: see `tile.slot_of`.
    """
    k0, r0, k1, r1 = view.sizes
    weights, slots = view.weights, 1
    if not weights.k1:
        slots *= grid.slots
    if not weights.r0:
        slots *= -(-r0 // layout.tile.r)
    if not weights.r1:
        slots *= -(-r1 // layout.tile.s)
    return k0, slots, r0 if weights.r0 else 1, k1 if weights.k1 else 1, r1 if weights.r1 else 1


def unit(size: int) -> int:
    """The largest power of two up to 16 that divides a size: how many elements a load may take at once."""
    return min(size & -size, 16)


def power_of_two(size: int) -> int:
    """The next one from a size on."""
    return 1 << (size - 1).bit_length()
