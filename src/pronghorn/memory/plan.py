"""What every layer keeps for a memory budget: the fastest choice that fits.

Layers are alike, so a plan is how many of them take which level. Layers that keep much on the device stand last: their
backward comes first, needs the least room besides, and by then copies to the host are done. Candidates are ranked by
predicted time and the first whose predicted reserved memory fits is taken.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pronghorn.blocks import LEVELS, Level, host_bytes_per_token, saved_bytes_per_token
from pronghorn.blocks.glu import TILE_ROWS, tile_slices
from pronghorn.blocks.levels import ROOMY_TILES, space_of
from pronghorn.errors import BudgetInvalid, BudgetTooSmall
from pronghorn.memory.cost import StepTime, layer_times, rebuilt_and_waited, step_time
from pronghorn.memory.estimate import Estimate, estimate, with_model
from pronghorn.memory.gpus import GIB, Rates, rates_of
from pronghorn.memory.pool import HOST_SHARE
from pronghorn.memory.schedule import Batch
from pronghorn.memory.shape import ModelShape

#: Of a GPU's memory, what "auto" leaves to others: the CUDA context, kernels that load later, fragmentation.
HEADROOM, HEADROOM_BYTES = 0.04, 700 * 2**20
#: Of a predicted reserve, what may come on top: of ten planned runs on an H200 nine ended at most 0.1 % above, one of
#: 4-bit weights 1.0 % (docs/planning.md).
MARGIN, FOUR_BIT_MARGIN = 0.005, 0.01
#: Tiles of the GLU block that are tried. Weights that are dequantised for every tile want tall ones.
TILES, TALL_TILES = (TILE_ROWS, 4096, 2048, 512), (TILE_ROWS, 8192, 2048, 512)
#: Of the layers that park, the shares that park more than their input.
SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Plan:
    """Levels of all layers, and what a step of them is predicted to take.

    Args:
        tile_rows: rows of a tile of the GLU block, None for the block's own choice; `ROOMY_TILES` for all rows, and
            larger chunks of the loss.
        estimate, time: of the largest batch the plan was made for.
    """

    levels: tuple[Level, ...]
    tile_rows: int | None
    budget: int
    batch: Batch
    estimate: Estimate
    time: StepTime
    reasons: tuple[str, ...]

    def counts(self) -> str:
        """``14x offload, 6x offload-attention, 12x matmuls``; parked layers stand first, the two kinds mixed."""
        return ", ".join(f"{count}x {level}" for level, count in self.by_level.items())

    @property
    def by_level(self) -> dict[str, int]:
        return {level: self.levels.count(level) for level in LEVELS if level in self.levels}


def parse_budget(text: str | int | float, free: int | None = None) -> int:
    """A budget in bytes: a number of bytes, "17.5GiB", "24 GB", "800MiB", or "auto" for what is `free` less a headroom.

    Raises:
        BudgetInvalid: for anything else.
    """
    if isinstance(text, int | float) and not isinstance(text, bool) and text > 0:
        return int(text)
    if text == "auto":
        if free is None:
            raise BudgetInvalid("the budget 'auto' needs a GPU to ask", fix="give a size, such as 24GiB")
        return max(int(free * (1 - HEADROOM)) - HEADROOM_BYTES, 0)
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT])(i?)B?\s*", str(text), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise BudgetInvalid(
            f"'{text}' is no memory size", fix='give bytes or a text such as "17.5GiB" or "auto"'
        )
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def plan(
    shape: ModelShape,
    budget: int,
    batch: Batch,
    *,
    rates: Rates | None = None,
    host_limit: int | None = None,
    offload: bool = True,
) -> Plan:
    """The fastest levels whose predicted *reserved* memory stays within the budget.

    Args:
        budget: bytes that torch may reserve on the GPU.
        batch: the largest batch that will come.
        rates: the GPU's; an H200's when not given.
        host_limit: most pinned host bytes; None means any.
        offload: whether the host's memory may be used.

    Raises:
        BudgetTooSmall: not even the leanest plan fits; with the numbers and the smallest change that helps.
    """
    search = _Search(shape, budget, batch, rates or rates_of("H200"), host_limit, offload)
    found = search.run()
    if found is None:
        raise _too_small(search)
    return found


def plan_if_it_fits(
    shape: ModelShape,
    budget: int,
    batch: Batch,
    *,
    rates: Rates,
    host_limit: int | None = None,
    offload: bool = True,
) -> Plan | None:
    """`plan`, or None where nothing fits: what would help, which takes longer to find than that, is not looked for."""
    return _Search(shape, budget, batch, rates, host_limit, offload).run()


def with_margin(reserved: int, shape: ModelShape) -> int:
    """The bytes that a model's predicted reserve asks of a budget."""
    return round(reserved * (1 + _margin(shape)))


def without_margin(budget: int, shape: ModelShape) -> int:
    """The largest predicted reserve that a budget holds with the model's margin."""
    return int(budget / (1 + _margin(shape)))


def _margin(shape: ModelShape) -> float:
    return FOUR_BIT_MARGIN if shape.storage.startswith("nf4") else MARGIN


def leanest(shape: ModelShape, batch: Batch, rates: Rates, offload: bool = True) -> Estimate:
    """The estimate that takes least: nothing kept on the device, short tiles."""
    level: Level = "offload" if offload else "none"
    tries = [
        estimate(shape, level, batch, tile_rows=rows, capability=rates.capability, settled_up_to=math.inf)
        for rows in _tiles(shape, batch)
    ]
    return min(tries, key=lambda found: found.reserved)


def smallest_budget(shape: ModelShape, batch: Batch, rates: Rates, offload: bool = True) -> int:
    """The bytes below which no plan fits."""
    return with_margin(leanest(shape, batch, rates, offload).reserved, shape)


def longest_that_fits(
    shape: ModelShape,
    budget: int,
    batch: Batch,
    rates: Rates,
    offload: bool = True,
    host_limit: int | None = None,
) -> int:
    """Most tokens of one step within the budget, in steps of 256; 0 when the model itself does not fit.

    Documents and supervised rows keep their share of the tokens.
    """

    shape = _tight(shape)
    per_token = shape.layers * host_bytes_per_token("offload", shape.widths)
    # Layers are alike: most of the search looks at a few of them, and adds what the others keep.
    few = replace(shape, layers=min(shape.layers, 6), layer_storages=(), linear_tensors=(), placed=None)
    others = shape.layers - few.layers
    more = with_model(shape, rates.capability)[0].reserved - with_model(few, rates.capability)[0].reserved

    def parked(tokens: int) -> bool:
        return offload and (host_limit is None or per_token * tokens <= host_limit)

    def nearly_fits(tokens: int) -> bool:
        there = 0 if parked(tokens) else others * saved_bytes_per_token("none", shape.widths) * tokens
        found = leanest(few, resized(batch, tokens), rates, parked(tokens))
        return with_margin(found.reserved + more + there, shape) <= budget

    low, high = 0, 1
    while high < 2**15 and nearly_fits(high * 256):
        low, high = high, high * 2
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if nearly_fits(middle * 256) else (low, middle)

    def takes(tokens: int) -> int:
        return smallest_budget(shape, resized(batch, tokens), rates, parked(tokens))

    while low and takes(low * 256) > budget:
        low -= max(1, low // 64)
    return low * 256


def resized(batch: Batch, tokens: int) -> Batch:
    """The batch with another number of tokens and as many documents."""
    return replace(batch, tokens=tokens, loss_rows=max(1, round(batch.loss_rows * tokens / batch.tokens)))


def _tiles(shape: ModelShape, batch: Batch) -> tuple[int, ...]:
    if shape.trained == "all":
        return TILES[:1]
    tiles = TALL_TILES if shape.unpacked_forward else TILES
    return tuple(rows for rows in tiles if rows < batch.tokens) or tiles[:1]


class _Search:
    """Candidates in the order of their predicted time; the first that fits wins."""

    def __init__(
        self,
        shape: ModelShape,
        budget: int,
        batch: Batch,
        rates: Rates,
        host_limit: int | None,
        offload: bool,
    ) -> None:
        self.shape, self.budget, self.batch, self.rates = shape, budget, batch, rates
        self.host_limit, self.offload = host_limit, offload
        self.times = layer_times(shape, batch, rates)
        self.lean: Estimate | None = None
        self._least = 0
        self._saved = {level: saved_bytes_per_token(level, shape.widths) * batch.tokens for level in LEVELS}
        self._host = {level: host_bytes_per_token(level, shape.widths) * batch.tokens for level in LEVELS}
        #: of levels that were looked at: `rebuilt_and_waited`, which their tiles do not change
        self._spent: dict[tuple[Level, ...], tuple[float, float]] = {}

    def run(self) -> Plan | None:
        if not self._surely_too_large(_times("all", self.shape.layers)):
            everything = self._plan(_times("all", self.shape.layers), None)
            if everything is not None:
                return everything
        self.shape = _tight(self.shape)
        if with_margin(with_model(self.shape, self.rates.capability)[0].reserved, self.shape) > self.budget:
            return None  # the model alone is too large
        lean = self.lean = leanest(self.shape, self.batch, self.rates, self.offload)
        if with_margin(lean.reserved, self.shape) > self.budget:
            return None
        # No level works with less than half of what the leanest needs besides what is kept.
        self._least = lean.fixed + (lean.allocated - lean.fixed) // 2
        ranked: list[tuple[float, int, tuple[Level, ...], int | None]] = []
        # The same with larger chunks of the loss (1.4 of 547 ms at 8B) stands first: its predicted time is the same.
        roomy = (ROOMY_TILES,) if self.batch.tokens <= TILE_ROWS and self.shape.mixture is None else ()
        heights = (*roomy, None, *(rows for rows in _tiles(self.shape, self.batch) if rows < TILE_ROWS))
        for levels in self._candidates():
            if not self._surely_too_large(levels):
                for rows in heights:
                    ranked.append((self._time(levels, rows).total, len(ranked), levels, rows))
        ranked.sort()
        # What alike plans took beside what they keep: the many that come out far above the budget need no estimate.
        beside: dict[tuple[frozenset[Level], int | None], int] = {}
        for _, _, levels, rows in ranked:
            kind, kept = (frozenset(levels), rows), _total(self._saved, levels)
            if kept + beside.get(kind, 0) > self.budget + self.budget // 200:
                continue
            found = self._estimate(levels, rows)
            if with_margin(found.reserved, self.shape) <= self.budget:
                return self._with_norms(self._as_plan(levels, rows, found))
            beside[kind] = found.reserved - kept
        return None

    def _candidates(self) -> Iterator[tuple[Level, ...]]:
        """(parked or nothing kept …, attention …, matmuls …) for all counts; of the parked ones a share parks more."""
        layers = self.shape.layers
        stride = max(1, layers // 40)
        for wide in range(0, layers + 1, stride):
            for middle in range(0, layers - wide + 1, stride):
                lean = layers - wide - middle
                tail = _times("attention", middle) + _times("matmuls", wide)
                yield _times("none", lean) + tail
                if not self.offload or not lean:
                    continue
                counts = sorted({round(share * lean) for share in SHARES})
                for count in counts:
                    yield _spread("offload", "offload-attention", lean, count) + tail
                for count in counts[1:]:
                    yield _spread("offload", "offload-matmuls", lean, count) + tail

    def _surely_too_large(self, levels: Sequence[Level]) -> bool:
        saved, host = _total(self._saved, levels), _total(self._host, levels)
        over_host = self.host_limit is not None and host > self.host_limit
        return over_host or self._least + saved > self.budget

    def _plan(self, levels: tuple[Level, ...], rows: int | None) -> Plan | None:
        found = self._estimate(levels, rows)
        return (
            self._as_plan(levels, rows, found)
            if with_margin(found.reserved, self.shape) <= self.budget
            else None
        )

    def _estimate(self, levels: tuple[Level, ...], rows: int | None) -> Estimate:
        """What levels take; looked at closely where they seem to fit."""
        return estimate(
            self.shape, levels, self.batch, tile_rows=rows, capability=self.rates.capability,
            settled_up_to=self.budget / (1 + _margin(self.shape)),
        )  # fmt: skip

    def _as_plan(self, levels: tuple[Level, ...], rows: int | None, found: Estimate) -> Plan:
        time = self._time(levels, rows)
        return Plan(
            levels, rows, self.budget, self.batch, found, time, tuple(_reasons(levels, rows, found, time))
        )

    def _time(self, levels: tuple[Level, ...], rows: int | None) -> StepTime:
        tiles = len(tile_slices(self.batch.tokens, rows or TILE_ROWS))
        space, beside = space_of(levels, rows), self._spent.get(levels)
        if beside is None:
            beside = rebuilt_and_waited(self.shape, levels, self.batch, self.rates, self.times)
            self._spent[levels] = beside
        return step_time(self.shape, levels, self.batch, self.rates, self.times, tiles, space, beside, rows)

    def _with_norms(self, found: Plan) -> Plan:
        """Norm outputs too, from the last layer down, as far as the rest of the budget goes."""
        wide = found.levels.count("matmuls")
        low, high = 0, wide + 1
        best = found
        while high - low > 1:
            middle = (low + high) // 2
            levels = found.levels[: len(found.levels) - middle] + _times("all", middle)
            more = self._plan(levels, found.tile_rows)
            low, high, best = (middle, high, more) if more is not None else (low, middle, best)
        return best


def _tight(shape: ModelShape) -> ModelShape:
    """The shape where not everything can be kept: frozen weights are then moved together (`engine.gathered`)."""
    return replace(shape, gathered=True) if shape.gathered is None and shape.trained == "adapters" else shape


def _total(sizes: Mapping[Level, int], levels: Sequence[Level]) -> int:
    return sum(count * sizes[level] for level, count in Counter(levels).items())


def _times(level: Level, count: int) -> tuple[Level, ...]:
    return (level,) * count


def _spread(little: Level, much: Level, layers: int, count: int) -> tuple[Level, ...]:
    """`count` layers of `much` among `little`, evenly, so that the link works all the time."""
    return tuple(much if (i + 1) * count // layers > i * count // layers else little for i in range(layers))


def _reasons(levels: Sequence[Level], rows: int | None, found: Estimate, time: StepTime) -> Iterator[str]:
    if set(levels) == {"all"}:
        yield "everything fits: nothing but the activation product is rebuilt"
        return
    yield f"{time.recompute_share:.0%} of full checkpointing's recomputation is left"
    if found.host:
        wait = f"; the computation waits {time.waiting * 1e3:.0f} ms for it" if time.waiting > 1e-3 else ""
        yield f"{found.host / GIB:.1f} GiB wait in host memory between forward and backward{wait}"
    if rows is not None and rows != ROOMY_TILES:
        yield f"the GLU block runs over tiles of {rows} tokens, so that its widest tensors exist for one at a time"


def _too_small(search: _Search) -> BudgetTooSmall:
    shape, batch, budget, rates = search.shape, search.batch, search.budget, search.rates
    least = search.lean or leanest(shape, batch, rates, search.offload)
    longest = longest_that_fits(shape, budget, batch, rates, search.offload, search.host_limit)
    fixes = []
    if longest:
        per_document = batch.tokens // max(batch.documents, 1)
        fix = f"give a step at most {longest:,} tokens"
        if batch.documents > 1 and longest >= per_document:
            rows = longest // per_document
            fix += f" (a batch of {rows} row{'s' if rows > 1 else ''} of {per_document:,})"
        fixes.append(fix)
    elif not shape.quantised and shape.trained == "adapters":
        packed = replace(shape, storage="nf4 double", layer_storages=(), linear_tensors=(), placed=None)
        lean4 = leanest(packed, batch, rates, search.offload)
        if with_margin(lean4.reserved, packed) <= budget:
            fixes.append(f"load in 4 bits, which takes {gib(lean4.reserved)}")
        elif longest_that_fits(packed, budget, batch, rates, search.offload, search.host_limit):
            fixes.append("load in 4 bits and shorten the rows")
    host_limit = search.host_limit
    host = shape.layers * host_bytes_per_token("offload", shape.widths) * batch.tokens
    if (
        search.offload
        and host_limit is not None
        and host > host_limit
        and with_margin(least.reserved, shape) <= budget
    ):
        on_gpu = smallest_budget(shape, batch, rates, offload=False)
        fixes.append(f"free host memory, or raise the budget to {gib(on_gpu)}")
        return BudgetTooSmall(
            f"a step of {batch.tokens:,} tokens fits into {gib(budget)} only with {gib(host)} of pinned host memory, "
            f"of which {gib(host_limit)} may be taken ({HOST_SHARE:.0%} of what was available)",
            fix=", or ".join(fixes),
        )
    fixes.append(f"raise the budget to {gib(with_margin(least.reserved, shape))}")
    kind = "the model alone takes" if least.fixed > budget else "the leanest plan for it takes"
    size = least.fixed if least.fixed > budget else with_margin(least.reserved, shape)
    return BudgetTooSmall(
        f"a step of {batch.tokens:,} tokens does not fit into {gib(budget)}: {kind} {gib(size)}",
        fix=", or ".join(fixes),
    )


def gib(size: int) -> str:
    """Rounded up: what is called enough is enough."""
    return f"{-(-size * 100 // GIB) / 100:.2f} GiB"
