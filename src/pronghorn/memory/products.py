"""The allocations of a projection group's products, as `blocks.projection` makes them."""

from __future__ import annotations

from pronghorn.blocks import joining
from pronghorn.blocks.glu import tile_slices
from pronghorn.blocks.projection.adapted import LONGEST_SUM
from pronghorn.kernels.glu_products import HALF, backward_tiling, forward_tiling
from pronghorn.kernels.lora import DEFERRED_RANK
from pronghorn.kernels.products import fits
from pronghorn.kernels.tiles import COLUMNS, fills, padded
from pronghorn.memory.allocator import Allocator
from pronghorn.memory.shape import ModelShape

QKV, OUT, GATE_UP, DOWN = ("q", "k", "v"), ("o",), ("gate", "up"), ("down",)
#: what a layer holds by name: handle and size
Held = dict[str, tuple[int, int]]


class Products:
    """What products of a stream of `tokens` take on an `Allocator`."""

    def __init__(self, shape: ModelShape, tokens: int, memory: Allocator, tile_rows: int) -> None:
        self.shape, self.tokens, self.memory, self.tile_rows = shape, tokens, memory, tile_rows
        self.element = shape.element

    def _joins_qkv(self) -> bool:
        """Whether q, k and v are made by one product."""
        shape = self.shape
        if shape.fused:
            return True
        return shape.joined and self._defers(QKV) and joining.joins_qkv_forward(self.tokens, shape.kv)

    def _project_gate_up(self, saves: Held, rows: int) -> None:
        """Gate and up from the norm's codes, which go then, or from rows that are quantised for them."""
        shape = self.shape
        added_later = self._defers(GATE_UP) or not shape.rank(*GATE_UP)
        joined = shape.fused_gate_up or (
            shape.joined and joining.GATE_UP_FORWARD and added_later and not shape.int8
        )
        self._project(saves, GATE_UP, "xa_gate_up", rows, [] if "codes" in saves else None, joined)
        self._drop(saves, "codes", "code_scales")

    def _residual_in_o(self, rows: int) -> bool:
        """`AttentionOutput.onto`."""
        shape = self.shape
        alone = shape.residual_in_o and not shape.output_norms and shape.residual_element == self.element
        return alone and shape.plain_products and fits(rows, shape.hidden)

    def _whole_input_grad(self, names: tuple[str, ...], rows: int) -> bool:
        """`ProjectionGroup._adapted_input_grad`."""
        shape = self.shape
        one = shape.joined or len(self._modules_of(names)) == 1
        if names[0] not in shape.whole_input_grads or not one or not shape.plain_products:
            return False
        length = sum(shape.module_linear(part)[0] for part in self._modules_of(names))
        return length <= LONGEST_SUM and fits(rows, shape.linear(names[0])[1])

    def _makes_unit(self, rows: int) -> bool:
        """`gated_products.takes_gate_up`."""
        return self.shape.makes_unit and fills(rows, self.shape.intermediate, HALF)

    def _goes_through_unit(self, rows: int) -> bool:
        """`gated_products.takes_down`."""
        shape = self.shape
        return shape.makes_unit and bool(shape.rank("down")) and fills(rows, shape.intermediate, COLUMNS)

    def _unit(self, saves: Held, rows: int, keep: bool, act: bool) -> int:
        """`kernels.glu_products`: gate and up as one matrix if they are kept, XA, and act (-1: not wanted)."""
        shape, e = self.shape, self.element
        if shape.rank(*GATE_UP):
            self._keep(saves, "xa_gate_up", rows * shape.rank(*GATE_UP) * e)
        if keep:
            self._keep(saves, "gate", rows * shape.intermediate * 2 * e)
        made = self._new(rows * shape.intermediate * e) if act else -1
        rank = shape.rank("down")
        if rank:
            self._keep(saves, "xa_down", rows * rank * e)
            sums = forward_tiling(rows, shape.intermediate, shape.processors).sums
            self._free(self._new(sums.most * rows * padded(rank) * 4))
        return made

    def _through_unit(self, rows: int) -> None:
        """The gradient of act goes through it inside the down projection's product."""
        shape, rank = self.shape, self.shape.rank("down")
        dxa = self._new(rows * rank * self.element)
        self._free(*[self._new(size) for size in self._partial_sums(DOWN, rows, True)])
        sums = backward_tiling(rows, shape.intermediate, shape.processors).sums
        self._free(self._new(sums.most * rank * shape.intermediate * 4))
        self._free(dxa)

    def _project(
        self,
        saves: Held,
        names: tuple[str, ...],
        xa: str,
        rows: int,
        made: list[int] | None = None,
        joined: bool = False,
    ) -> None:
        """`ProjectionGroup.forward`; outputs and XA are kept under their names. `made`: its rows in fp8 are there;
        `joined`: the outputs are one matrix, by the first one's name."""
        shape, e = self.shape, self.element
        if shape.rank(*names) and xa not in saves:
            self._keep(saves, xa, rows * shape.rank(*names) * e)
        # The adapters' share is there first, where the product adds to it and nobody else takes it in on the way.
        begun = bool(shape.rank(*names)) and not shape.eight_bit_forward and not self._defers(names)
        parts = (names,) if joined else tuple((name,) for name in names)
        for part in parts if begun else ():
            self._keep(saves, part[0], rows * shape.module_linear(part)[0] * e)
        operand = self._operand(names[0], rows) if made is None else made
        for part in parts:
            unpacked = self._new(shape.linear_parameters(*part) * shape.unpacked_forward)
            if not begun:
                self._keep(saves, part[0], rows * shape.module_linear(part)[0] * e)
            self._free(unpacked)
        self._free(*operand)

    def _defers(self, names: tuple[str, ...]) -> bool:
        """Whether the group's consumer adds the adapters' share: the activation, or a rotation without norms."""
        if (names == QKV and self.shape.qk_norm) or self.shape.int8:
            return False
        ranks = [self.shape.ranks.get(name, 0) for name in names]
        return names in (QKV, GATE_UP) and 0 < max(ranks) <= DEFERRED_RANK

    def _operand(self, name: str, rows: int) -> list[int]:
        """Rows of a product's input in 8 bits."""
        width = self.shape.linear(name)[1]
        return [self._new(rows * width), self._new(4 * rows)] if self.shape.eight_bit_forward else []

    def _add(self, name: str, rows: int) -> None:
        """A projection onto what is there: a residual sum, or one with the adapter's share."""
        shape = self.shape
        operand = self._operand(name, rows)
        unpacked = self._new(shape.linear_parameters(name) * shape.unpacked_forward)
        # An fp8 product cannot add in place.
        apart = self._new(rows * shape.hidden * self.element) if shape.fp8_forward else -1
        self._free(unpacked, apart, *operand)

    def _joined_operand(self, names: tuple[str, ...], rows: int) -> list[int] | None:
        """dY of a stack in 8 bits, made before its products; None without one."""
        fused = self.shape.fused_gate_up if names == GATE_UP else self.shape.fused
        if fused or not (self.shape.joined and self.shape.eight_bit_forward):
            return None
        return [self._new(rows * sum(self.shape.linear(name)[0] for name in names)), self._new(4 * rows)]

    def _input_grad(
        self,
        names: tuple[str, ...],
        rows: int,
        with_b: bool,
        need: bool = True,
        codes: list[int] | None = None,
    ) -> int:
        """`ProjectionGroup.input_grad`: dX [rows, in]; dXA is counted while dX is made. `codes`: of a stack's dY."""
        shape, e = self.shape, self.element
        width, rank = shape.linear(names[0])[1], shape.rank(*names)
        dxa = self._new(rows * rank * e)
        # The adapters' share of dX is made along with dXA, where products add to it.
        starts = bool(rank) and need and not shape.fp8_backward and not shape.int8
        starts = starts and not self._whole_input_grad(names, rows)
        dx = self._new(rows * width * e) if starts else -1
        if rank:
            self._free(*[self._new(size) for size in self._partial_sums(names, rows, with_b)])
        if need and shape.int8:
            dx = self._int8_input_grad(names, rows, codes)
        elif need and shape.fp8_backward:
            dx = self._quantised_input_grad(names, rows, rank > 0, codes)
        else:
            dx = self._new(rows * width * e) if need and not starts else dx
            for part in self._modules_of(names) if need else ():
                self._free(self._new(shape.linear_parameters(*part) * shape.unpacked_backward))
        self._free(dxa)
        return dx

    def _modules_of(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The modules that give the projections of a group."""
        return [part for part in self.shape.modules if part[0] in names]

    def _quantised_input_grad(
        self, names: tuple[str, ...], rows: int, summed: bool, codes: list[int] | None
    ) -> int:
        """dX of products that cannot add in place: a part a weight or one of a stack, then (with adapters) their sum by
        one kernel."""
        shape = self.shape
        size = rows * shape.linear(names[0])[1] * self.element
        operands, parts = codes or [], []
        for of in self._modules_of(names) if codes is None else [names]:
            if codes is None:
                operands += [self._new(rows * shape.module_linear(of)[0]), self._new(4 * rows)]
            unpacked = self._new(shape.linear_parameters(*of) * shape.unpacked_backward)
            parts.append(self._new(size))
            self._free(unpacked)
            if not summed and len(parts) > 1:
                self._free(parts.pop())
        dx = self._new(size) if summed else parts.pop()
        self._free(*operands, *parts)
        return dx

    def _int8_input_grad(self, names: tuple[str, ...], rows: int, codes: list[int] | None) -> int:
        """dX of products that add: one of a stack, or one a weight onto the one before."""
        shape = self.shape
        size, dx = rows * shape.linear(names[0])[1] * self.element, -1
        for of in self._modules_of(names) if codes is None else [names]:
            operand = codes or [self._new(rows * shape.module_linear(of)[0]), self._new(4 * rows)]
            turned = self._new(shape.linear_parameters(*of) * shape.unpacked_backward)
            made, before = self._new(size), dx
            # Of one copy dX is turned back.
            dx = self._new(size) if shape.turns_back else made
            self._free(made if made != dx else -1, turned, before, *operand)
        return dx

    def _partial_sums(self, names: tuple[str, ...], rows: int, with_b: bool) -> list[int]:
        """Partial sums of the kernel that forms dXA and dB in one reading (kernels/triton/lora_grads)."""
        shape = self.shape
        adapted = [part for part in self._modules_of(names) if shape.rank(*part)]
        ranks = [shape.rank(*part) for part in adapted]
        if max(ranks) > 128:
            return []
        widths = [shape.module_linear(part)[0] for part in adapted]
        wide = padded(max(ranks))
        columns = {16: 512 if rows * sum(widths) >= 2**25 else 256, 32: 256, 64: 128}.get(wide, 64)
        blocks = sum(-(-width // columns) for width in widths)
        shares = max(1, min(-(-132 // blocks), rows // 64 or 1))
        return [blocks * rows * wide * 4, shares * sum(widths) * wide * 4 if with_b else 0]

    # --- bookkeeping ---------------------------------------------------------------------------------------------

    def _residual(self) -> int:
        return self.tokens * self.shape.hidden * self.shape.residual_element

    def _tiles(self, tile_rows: int | None = None) -> list[slice]:
        """Tiles of the GLU block, or of at most `tile_rows` rows."""
        if self.shape.trained != "adapters" or not self.shape.rows_go_apart:
            return [slice(0, self.tokens)]
        tiles = tile_slices(self.tokens, tile_rows or self.tile_rows)
        if len(tiles) <= 4 or self.shape.mixture is not None:
            return tiles
        # Each after the third finds the memory as that one did; the last is lower. A row of 200,000 tokens has 400.
        return [*tiles[:3], tiles[-1]]

    def _new(self, size: int) -> int:
        return self.memory.new(size)

    def _free(self, *handles: int) -> None:
        self.memory.free(*handles)

    def _keep(self, saves: Held, name: str, size: int) -> None:
        assert name not in saves, name
        saves[name] = (self._new(size), size)

    def _drop(self, saves: Held, *names: str) -> None:
        for name in names:
            if name in saves:
                self._free(saves.pop(name)[0])
