"""The allocations of one training step, in the order in which the engine makes them.

This follows `engine.forward`, `blocks.layer`, `blocks.attention`, `blocks.glu`, `blocks.projection` and the loss line
by line: what is made when, and how long something still refers to it. A change there is a change here; the GPU test in
tests/memory compares the two. Sizes in comments are a token's, H hidden, e and r the bytes of an element of the compute
dtype and of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pronghorn.blocks import Level, joining, keeps, parks
from pronghorn.blocks.head_groups import head_groups
from pronghorn.blocks.levels import is_roomy, space_of
from pronghorn.kernels.attention.cudnn_plans import bucket
from pronghorn.kernels.linear_cross_entropy import default_chunk_rows
from pronghorn.memory import long_rows
from pronghorn.memory.allocator import Allocator
from pronghorn.memory.parking import Parking
from pronghorn.memory.products import DOWN, GATE_UP, OUT, QKV, Held
from pronghorn.memory.shape import ModelShape

_ATTENTION = ("q", "k", "v", "gate_of_output", "out", "lse", "xa_qkv", "xa_o", "projected_attention")
_GLU = ("gate", "up", "xa_gate_up", "xa_down", "projected_glu")


@dataclass(frozen=True)
class Batch:
    """What a step computes on: tokens of the stream, rows of the loss, documents."""

    tokens: int
    loss_rows: int
    documents: int = 1


class Step(Parking):
    """One forward and backward on an `Allocator`. `run` leaves nothing allocated; `moments` names the peaks."""

    def __init__(
        self, shape: ModelShape, levels: Sequence[Level], batch: Batch, memory: Allocator, tile_rows: int
    ) -> None:
        super().__init__(shape, batch.tokens, memory, tile_rows, len(levels))
        self.levels, self.batch = levels, batch
        self.moments: dict[str, int] = {}

    def of_rows(self, rows: int) -> Step:
        """What some rows take, in one tile."""
        return Step(self.shape, (), replace(self.batch, tokens=rows), self.memory, rows)

    # --- the step ----------------------------------------------------------------------------------------------

    def run(self, *between: Callable[[], None]) -> None:
        """Forward, loss, backward.

        Args:
            between: what else happens after the loss, on the same allocator.
        """
        shape, t = self.shape, self.tokens
        inputs = [self._new(8 * t) for _ in range(4)]
        hidden = self._new(self._residual())
        angles = self._angles()
        for index, level in enumerate(self.levels):
            hidden = self._layer_forward(index, level, hidden)
        self._mark("forward")
        normed, rstd = self._new(t * shape.hidden * self.element), self._new(4 * t)
        gradient = self._loss(normed)
        for other in between:
            other()
        self._mark("loss")
        dhidden = self._new(self.batch.loss_rows * shape.hidden * self.element)
        self._free(gradient)
        dout = self._new(t * shape.hidden * self.element)
        self._free(dhidden)
        dx = self._new(self._residual())
        self._free(dout, hidden, rstd)
        for index in reversed(range(len(self.levels))):
            dx = self._layer_backward(index, self.levels[index], dx)
            self._mark("backward")
        self._free(dx, *angles, *inputs)

    def _angles(self) -> list[int]:
        """cos and sin as Transformers makes them, through fp32."""
        width, angles = self.tokens * self.shape.head_dim, []
        for _ in range(self.shape.rotations):
            wide = [self._new(2 * width), self._new(4 * width)]
            for _ in range(2):
                unscaled = self._new(4 * width)
                wide.append(self._new(4 * width))
                self._free(unscaled)
            angles += [self._new(width * self.element) for _ in range(2)]
            self._free(*wide)
        return angles

    def _loss(self, normed: int) -> int:
        """The gradient of the loss's rows; the final norm's output is let go of."""
        shape, rows = self.shape, self.batch.loss_rows
        e = self.element
        taken = self._new(rows * shape.hidden * e)
        self._free(normed)
        gradient = self._new(rows * shape.hidden * e)
        space = space_of(self.levels, self.tile_rows)
        chunk = default_chunk_rows(shape.vocabulary, e, "cuda", space)
        for start in range(0, rows, chunk):
            self._free(self._new(min(chunk, rows - start) * shape.vocabulary * e))
        self._free(taken)
        return gradient

    # --- a layer, forward ---------------------------------------------------------------------------------------

    def _layer_forward(self, index: int, level: Level, x: int) -> int:
        saves: Held = {}
        out = self._output(level, saves)
        kept = {"x": (x, self._residual()), **saves}
        if parks(level):
            self._park(index, kept)
        else:
            self.kept[index] = kept
        return out

    def _output(self, level: Level, saves: Held) -> int:
        """`DecoderLayer.forward`: the layer's output; what the level keeps stays in `saves`."""
        if long_rows.splits(self.shape, self.tokens, level):
            return long_rows.forward(self)
        self._attend(level, saves)
        self._trim_attention(level, saves)
        return self._glu_forward(level, saves)

    def _trim_attention(self, level: Level, saves: Held) -> None:
        """`AttentionSaves.trim`, but for the norm's output."""
        if not keeps(level, "attention"):
            self._drop(saves, *_ATTENTION)

    def _attend(self, level: Level, saves: Held) -> None:
        """`DecoderLayer._attend`: up to the residual sum and its norm."""
        shape, t = self.shape, self.tokens
        self._attention(saves)
        if not keeps(level, "all"):
            self._drop(saves, "normed_attention")
        if "summed" not in saves:
            whole = is_roomy([level]) and self._output_names == OUT and self._residual_in_o(t)
            branch = -1 if whole else self._branch(saves)
            if whole:
                read = self._read_by_o()
                if shape.rank("o") and "xa_o" not in saves:
                    self._keep(saves, "xa_o", t * shape.rank("o") * self.element)
                self._keep(saves, "summed", self._residual())
                self._free(read)
            # A mixture's rows are not multiplied in 8 bits.
            if len(self._tiles()) == 1 and shape.eight_bit_forward and shape.mixture is None:
                self._keep(saves, "codes", t * shape.hidden)
                self._keep(saves, "code_scales", 4 * t)
            self._keep(saves, "normed_glu", self._norm_size(t))
            rstd = self._new(4 * t)
            if not whole:
                self._keep(saves, "summed", self._residual())
            self._free(rstd, branch)

    def _attention(self, saves: Held) -> None:
        """`AttentionBlock.rebuild`: up to the attention's output."""
        self._heads(saves)
        self._attention_output(saves)

    def _heads(self, saves: Held) -> None:
        """`AttentionBlock.make_heads`."""
        shape, t, e = self.shape, self.tokens, self.element
        if "q" not in saves:
            codes = None
            if "normed_attention" not in saves:
                codes = self._operand("q", t)
                self._keep(saves, "normed_attention", self._norm_size(t))
                self._free(self._new(4 * t))
            joined = self._joins_qkv()
            self._project(saves, QKV, "xa_qkv", t, codes, joined)
            if joined:  # the rotation writes them apart
                wide, _ = saves.pop("q")
                for name in QKV:
                    self._keep(saves, name, t * shape.linear(name)[0] * e)
                self._free(wide)
            if shape.gated:
                wide, _ = saves.pop("q")
                for name in ("q", "gate_of_output"):
                    self._keep(saves, name, t * shape.q * e)
                self._free(wide)

    def _attention_output(self, saves: Held) -> None:
        """`AttentionBlock.attend`."""
        shape, t, e = self.shape, self.tokens, self.element
        if "out" not in saves:
            rotated = [self._new(t * width * e) for width in (shape.q, shape.kv)] if shape.qk_norm else []
            self._keep(saves, "out", t * shape.q * e)
            self._keep(saves, "lse", 4 * t * shape.heads)
            self._free(*rotated)

    def _branch(self, saves: Held) -> int:
        """`AttentionBlock.output`: what the residual sum adds."""
        shape, size = self.shape, self.tokens * self.shape.hidden * self.element
        if "projected_attention" not in saves:
            read, (name,) = self._read_by_o(), self._output_names
            self._project(saves, (name,), "xa_o", self.tokens)
            saves["projected_attention"] = saves.pop(name)
            self._free(read)
        branch = (
            saves["projected_attention"][0] if shape.output_norms else saves.pop("projected_attention")[0]
        )
        if shape.output_norms:
            branch = self._new(size)
            self._free(self._new(4 * self.tokens))
        return branch

    @property
    def _output_names(self) -> tuple[str, ...]:
        """The projection of the attention's output."""
        return OUT

    def _read_by_o(self) -> int:
        """`AttentionOutput.read_by_o`, where a gate makes it; else -1."""
        return self._new(self.tokens * self.shape.q * self.element) if self.shape.gated else -1

    def _glu_forward(self, level: Level, saves: Held) -> int:
        """The layer's output."""
        shape, e = self.shape, self.element
        keeps_all, keeps_wide, keeps_sum = (keeps(level, d) for d in ("all", "matmuls", "attention"))  # type: ignore[arg-type]
        keeps_projected = shape.output_norms and keeps_sum
        keeps_sum = keeps_all if shape.output_norms else keeps_sum or shape.parallel
        tiles = self._tiles() if not keeps_wide else [slice(0, self.tokens)]
        out = self._new(self._residual()) if keeps_sum and (self._apart or len(tiles) > 1) else -1
        if keeps_projected and len(tiles) > 1:
            self._keep(saves, "projected_glu", self.tokens * shape.hidden * e)
        for at in tiles:
            rows = at.stop - at.start
            whole = self._makes_unit(rows)
            if whole:
                act = self._unit(saves, rows, keeps_wide, True)
            else:
                self._project_gate_up(saves, rows)
            if not keeps_all and len(tiles) == 1:
                self._drop(saves, "normed_glu")
            if not whole:
                act = self._new(rows * shape.intermediate * e)
            if not keeps_wide:
                self._drop(saves, "gate", "up", "xa_gate_up")
            if self._apart:
                self._project(saves, DOWN, "xa_down", rows)
                self._free(act)
                normed = [self._new(rows * shape.hidden * e)] if shape.output_norms else []
                self._free(*[self._new(4 * rows) for _ in normed])
                if keeps_projected and len(tiles) == 1:
                    saves["projected_glu"] = saves.pop("down")
                self._drop(saves, "down")
                self._free(*normed)
            else:
                if "xa_down" not in saves:
                    self._keep(saves, "xa_down", rows * shape.rank("down") * e)
                if keeps_sum and len(tiles) == 1:
                    out = self._new(self._residual())
                self._add("down", rows)
                self._free(act)
            if not keeps_wide:
                self._drop(saves, "xa_down")
        if not keeps_all:
            self._drop(saves, "normed_glu")
        if not keeps_sum:
            out, _ = saves.pop("summed")
        return out

    # --- a layer, backward --------------------------------------------------------------------------------------

    def _layer_backward(self, index: int, level: Level, dout: int) -> int:
        shape = self.shape
        saves = self._fetch(index) if parks(level) else self.kept[index]
        need = index > 0 or shape.trained == "all"
        if long_rows.splits(shape, self.tokens, level):
            dx = long_rows.backward(self, dout, need)
        else:
            dx = self._input_gradient(level, saves, need)
            self._free(dout)
        self._drop(saves, *list(saves))
        return dx

    def _input_gradient(self, level: Level, saves: Held, need: bool) -> int:
        """`DecoderLayer.backward`."""
        shape, t = self.shape, self.tokens
        self._attend(level, saves)
        dsummed, codes = self._glu_backward(saves)
        self._drop(saves, "summed", "normed_glu")
        self._drop_glu(saves)
        dbranch = self._branch_grad(t) if self._apart else -1
        if shape.output_norms and shape.hands_on:
            codes = [self._new(t * shape.hidden), self._new(4 * t)]
        self._drop(saves, "projected_attention")
        read = self._read_by_o()
        dout_o = self._input_grad(self._output_names, t, "xa_o" in saves, True, codes)
        self._free(dbranch, read)
        dx = self._attention_backward(saves, dout_o, need)
        self._free(dsummed)
        return dx

    def _attention_backward(self, saves: Held, dout_o: int, need: bool) -> int:
        """`AttentionBlock.backward` from the gradient of the attention's output on."""
        shape, t, e = self.shape, self.tokens, self.element
        dgate = []
        if shape.gated:
            dout_o, *dgate = self._after(dout_o, [self._new(t * shape.q * e) for _ in range(2)])
            self._drop(saves, "gate_of_output")
        rotated = [self._new(t * width * e) for width in (shape.q, shape.kv)] if shape.qk_norm else []
        groups, gradients = head_groups(t, shape.kv_heads, shape.attention), []
        if groups == 1:
            gradients = [self._new(t * width * e) for width in (shape.q, shape.kv, shape.kv)]
        for _ in range(groups):
            self._free(*[self._new(size) for size in self._attention_workspace()][::-1])
        self._drop(saves, "out")
        if groups == 1:
            self._free(dout_o)
            self._drop(saves, "lse", "v")
            self._free(*rotated)
        else:  # gradients are written over dout, k and v
            self._drop(saves, "lse")
            keys = rotated.pop() if rotated else saves.pop("k")[0]
            gradients = [dout_o, keys, saves.pop("v")[0]]
            self._free(*rotated)
        if shape.qk_norm:
            fresh = [self._new(t * width * e) for width in (shape.q, shape.kv)]
            if shape.gated:
                fresh[:1] = self._after(fresh[0], [self._new(2 * t * shape.q * e)])
            self._free(*gradients[:2], *dgate)
            gradients = [*fresh, gradients[2]]
        return self._through_projections(saves, gradients, need)

    def _through_projections(self, saves: Held, gradients: list[int], need: bool) -> int:
        """The end of `AttentionBlock.through_projections`, from the gradients of q, k and v after their norms."""
        shape, t, e = self.shape, self.tokens, self.element
        codes = None
        joined = shape.joined and need and (joining.QKV_INPUT_GRAD or shape.fp8_forward)
        if (joined or shape.fused) and not shape.qk_norm:
            wide = self._new(t * (shape.q + 2 * shape.kv) * e)
            codes = None if shape.int8 else self._joined_operand(QKV, t)
            self._free(*gradients)
            gradients = [wide]
            codes = self._joined_operand(QKV, t) if shape.int8 else codes
        self._drop(saves, "q", "k")
        return self._through_norm(saves, QKV, "xa_qkv", gradients, need, codes)

    def _after(self, source: int, made: list[int]) -> list[int]:
        """What was made of something, which goes then."""
        self._free(source)
        return made

    def _through_norm(
        self,
        saves: Held,
        names: tuple[str, ...],
        xa: str,
        gradients: list[int],
        need: bool,
        codes: list[int] | None = None,
    ) -> int:
        """From the gradients of the projections that read the layer's norm to the one of its input."""
        t = self.tokens
        if "normed_attention" not in saves:
            self._keep(saves, "normed_attention", self._norm_size(t))
            self._free(self._new(4 * t))
        dnormed = self._input_grad(names, t, xa in saves, need, codes)
        dx = self._new(self._residual()) if need else -1
        self._free(*gradients[::-1], dnormed)  # a list lets go of its last item first
        return dx

    def _glu_backward(self, saves: Held) -> tuple[int, list[int] | None]:
        """The gradient of the residual sum, and its codes where the norm's backward makes them for o."""
        shape, e = self.shape, self.element
        tiles = self._tiles()
        dsummed = self._new(self._residual()) if len(tiles) > 1 else -1
        kept = "gate" in saves
        codes: list[int] | None = None
        for at in tiles:
            rows = at.stop - at.start
            if not kept:
                rebuilt = "normed_glu" not in saves
                if rebuilt:
                    made = shape.fp8_forward or (shape.int8 and len(tiles) == 1)
                    if made and not shape.parallel:  # LayerNorm's output is quantised by who multiplies it
                        self._keep(saves, "codes", rows * shape.hidden)
                        self._keep(saves, "code_scales", 4 * rows)
                    self._keep(saves, "normed_glu", self._norm_size(rows))
                if self._makes_unit(rows):
                    self._unit(saves, rows, True, False)
                else:
                    self._project_gate_up(saves, rows)
            else:
                rebuilt = False
            dbranch = self._projected_grad(saves, rows)
            if (
                self._goes_through_unit(rows)
                and "xa_down" in saves
                and (not kept or self._makes_unit(self.tokens))
            ):
                self._through_unit(rows)
            else:
                dact = self._input_grad(DOWN, rows, kept)
                self._free(dact)
            if kept and "normed_glu" not in saves:
                rebuilt = True
                self._keep(saves, "normed_glu", self._norm_size(rows))
            dnormed = self._input_grad(GATE_UP, rows, True, True, self._joined_operand(GATE_UP, rows))
            hands_on = shape.hands_on and not shape.parallel
            if len(tiles) == 1 and hands_on and shape.residual_element == e and not self._apart:
                codes = [self._new(rows * shape.hidden), self._new(4 * rows)]
            part = self._new(rows * shape.hidden * shape.residual_element)
            self._free(dbranch)
            if not kept:
                self._drop(saves, "gate", "up", "xa_gate_up", "xa_down")
            elif len(tiles) == 1:
                self._drop(saves, "gate", "up")
            self._free(dnormed)
            if rebuilt and not (shape.parallel and len(tiles) == 1):  # the attention beside it reads it, too
                self._drop(saves, "normed_glu")
            if len(tiles) > 1:
                self._free(part)
            else:
                dsummed = part
        return dsummed, codes

    def _drop_glu(self, saves: Held) -> None:
        """What the GLU block kept, but for the residual sum and its norm."""
        self._drop(saves, *_GLU)

    def _norm_size(self, rows: int) -> int:
        """Bytes of what a norm in front of attention or MLP gives."""
        return rows * self.shape.hidden * self.element if self.shape.pre_norms else 0

    @property
    def _apart(self) -> bool:
        """Whether something comes between a branch's projection and the residual sum."""
        return self.shape.output_norms or self.shape.scaled_branches

    def _branch_grad(self, rows: int) -> int:
        """The gradient of what a norm or a factor made of a branch."""
        size = rows * self.shape.hidden
        scaled = self._new(size * self.shape.residual_element) if self.shape.scaled_branches else -1
        if not self.shape.output_norms:
            return scaled
        found = self._new(size * self.element)
        self._free(scaled)
        return found

    def _projected_grad(self, saves: Held, rows: int) -> int:
        """`GluBlock._branch_grad`: the gradient of the down projection's output, which is made again where it is not
        kept; -1 where it is the layer's."""
        shape = self.shape
        if not self._apart:
            return -1
        if not shape.output_norms or "projected_glu" in saves:
            found = self._branch_grad(rows)
            if len(self._tiles()) == 1:
                self._drop(saves, "projected_glu")
            return found
        act = self._new(rows * shape.intermediate * self.element)
        self._drop(saves, "xa_down")
        self._project(saves, DOWN, "xa_down", rows)
        self._free(act)
        found = self._branch_grad(rows)
        self._drop(saves, "down")
        return found

    def _attention_workspace(self, own: Literal["", "dout", "all"] = "") -> list[int]:
        """What lives while the gradients of one group of heads are made, besides those of all heads; less the copies of
        what the group has of its "own"."""
        shape, t, e = self.shape, self.tokens, self.element
        groups = head_groups(t, shape.kv_heads, shape.attention)
        heads, q, kv = shape.heads // groups, shape.q // groups, shape.kv // groups
        # Parts of dout and out are copied to lie contiguously; the group's own gradients are copied into place.
        copied = {"": [q, q], "dout": [q], "all": []}[own]
        parts = [t * width * e for width in (*copied, q, kv, kv)] if groups > 1 else []
        if shape.attention == "cudnn":
            # It wants q, k, v and the statistics of the group contiguous, too.
            more = [*[t * width * e for width in (q, kv, kv)], 4 * t * heads] if groups > 1 else []
            _, _, most = bucket(self.batch.documents, t, t)
            row_sums = 4 * most * heads if groups > 1 else 0  # else too little to count
            return [*(more if own != "all" else []), *parts, 12 * most * q + row_sums]
        if shape.attention == "flex":
            # The forward pass again with its statistics, their share of the gradients, and gradients heads first.
            return [t * q * e, 4 * t * heads, 4 * t * heads, *(t * width * e for width in (q, kv, kv))]
        padded = t + 128 * self.batch.documents
        head = -(-shape.head_dim // 32) * 32
        sums = [4 * padded * heads, 4 * padded * heads * head]
        return parts + sums + ([t * q * e] * 2 if shape.heads != shape.kv_heads else [])

    def _mark(self, moment: str) -> None:
        """The most that was allocated since the last mark."""
        self.moments[moment] = max(self.moments.get(moment, 0), self.memory.peak_allocated)
        self.memory.peak_allocated = self.memory.allocated
