"""A model's sizes as far as memory and time depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal

from pronghorn.blocks import LayerWidths
from pronghorn.kernels.tiles import PROCESSORS
from pronghorn.memory.parts import DeltaShape, LatentShape, MixtureShape
from pronghorn.memory.storages import ELEMENT, GRAD_IN_FP8, IN_FP8, IN_INT8, stored_tensors

#: The projections of a layer in the order of their use.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder model and of what is trained on it.

    Args:
        ranks: adapter rank by projection ("q" … "down"); absent or 0 means no adapter there.
        storage: how the layers' linear weights are stored, one of `STORAGES`.
        layer_storages: each layer's own, where they differ; `storage` is then the one that most have.
        linear_tensors: bytes of every tensor that holds the layers' linear weights, where modules of one layer are
            stored in different ways (dynamic quantisation); `storage` is then the one that most have. `stack_tensors`:
            the same of stacks of experts.
        dtype: the compute dtype; embeddings, norms and head are stored in it.
        residual_element: bytes of an element of the residual stream.
        trained: "adapters", or "all" for full fine-tuning in the stored dtype.
        attention: the attention implementation ("flash", "cudnn", …), which decides its workspace.
        packed: adapters lie in flat storage, with a copy in the compute dtype.
        fused: q, k, v are one module; the rank of its adapter stands under q. `fused_gate_up`: so are gate, up.
        qk_norm: q and k are normed; with weights for every element where these are `norms_of_all_heads`.
        output_norms: norms follow the o- and the down-projection.
        scaled_branches: what attention and MLP give is multiplied before the residual sum.
        parallel: the MLP is beside the attention, on the same norm.
        pre_norms: norms stand in front of attention and MLP.
        rotations: kinds of angles that layers rotate by.
        joined: the plain weights of q, k, v and of gate, up lie side by side (`weights.stack`).
        state_element: bytes of each of the optimizer's two states per trained element.
        mixture: the MLP of the layers, where they are mixtures of experts.
        dense_layers: how many layers have an MLP of `intermediate` all the same; a step is planned as if they had none.
        captured: steps are recorded as graphs, so that a step's tensors lie in a pool of their own.
        in_one_piece: that pool is asked for in one piece of the size that a plan gives.
        placed: bytes that the allocator holds for weights, adapters and their gradients, where that was asked; else it
            follows from their sizes.
        elsewhere: the weights lie in another process's memory, and count nowhere.
        gathered: frozen 4-bit weights lie in common buffers (`weights.gathered`), as plain ones do when they are read.
            None leaves it to a plan: they do where not everything can be kept.
        wide_heads: what makes q and k is multiplied in 16 bits where the rest is in int8 (`loading.int8`, over 4 bits).
        latent: the attention, where it is latent. Projections are then q (or its code), kv (the other code), q_up and
            kv_up; `head_dim` is that of q and k.
        delta: the layers that have another attention, where there are such.
        rows_go_apart: blocks may run over tiles of rows: no adapter drops anything, and none is in 16 bits.
        gated: the q-projection gives a gate of the attention's output besides.
        processors: of the GPU, which decide how many partial sums such products leave
        unit_in_products: adapters, biases and GPU let the products around the gated unit make it themselves
            (`blocks.gated_products`), where weights lie as they are multiplied.
        residual_in_o: the o-projection's adapter and GPU let its product add the residual itself
        whole_input_grads: first projections of groups whose adapters' share of dX a product in 16 bits adds
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    storage: str = "bfloat16"
    layer_storages: tuple[str, ...] = ()
    linear_tensors: tuple[int, ...] = ()
    stack_tensors: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    residual_element: int = 2
    tied: bool = False
    qk_norm: bool = False
    norms_of_all_heads: bool = False
    qkv_bias: bool = False
    fused: bool = False
    fused_gate_up: bool = False
    output_norms: bool = False
    scaled_branches: bool = False
    parallel: bool = False
    pre_norms: bool = True
    rotations: int = 1
    trained: Literal["adapters", "all"] = "adapters"
    attention: str = "flash"
    packed: bool = True
    joined: bool = False
    state_element: int = 4
    mixture: MixtureShape | None = None
    dense_layers: int = 0
    captured: bool = True
    in_one_piece: bool = True
    placed: int | None = None
    elsewhere: bool = False
    gathered: bool | None = None
    wide_heads: bool = False
    latent: LatentShape | None = None
    delta: DeltaShape | None = None
    gated: bool = False
    rows_go_apart: bool = True
    unit_in_products: bool = False
    processors: int = PROCESSORS
    residual_in_o: bool = False
    whole_input_grads: tuple[str, ...] = ()

    @property
    def element(self) -> int:
        return ELEMENT[self.dtype]

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    def linear(self, name: str) -> tuple[int, int]:
        """(out, in) of a projection; of a mixture's, what all experts of a token come to."""
        mixture = self.mixture
        wide = self.intermediate if mixture is None else mixture.top_k * mixture.intermediate + mixture.shared
        h, i, q, kv = self.hidden, wide, self.q, self.kv
        latent = self.latent
        if latent is not None and name not in ("gate", "up", "down"):
            of_v = self.heads * latent.value
            return {
                "q": (latent.q_code or q, h),
                "kv": (latent.kv_code + latent.rope, h),
                "q_up": (q, latent.q_code),
                "kv_up": (self.heads * latent.nope + of_v, latent.kv_code),
                "o": (h, of_v),
            }[name]
        delta = self.delta
        if delta is not None and name in delta.names:
            return (h, delta.wide) if name == delta.output else (delta.inputs[name], h)
        return {
            "q": (2 * q if self.gated else q, h),
            "k": (kv, h),
            "v": (kv, h),
            "o": (h, q),
            "gate": (i, h),
            "up": (i, h),
            "down": (h, i),
        }[name]

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """The projections that each linear module gives; a mixture has none."""
        of_heads = (("q", "k", "v"),) if self.fused else tuple((name,) for name in self.of_heads)
        if self.mixture is not None:
            return (*of_heads, ("o",))
        gate_up = (("gate", "up"),) if self.fused_gate_up else (("gate",), ("up",))
        return (*of_heads, ("o",), *gate_up, ("down",))

    def modules_of(self, recurrent: bool) -> tuple[tuple[str, ...], ...]:
        """`modules` of a layer, of the attention that it has."""
        if not recurrent or self.delta is None:
            return self.modules
        of_mlp = [names for names in self.modules if names[0] in PROJECTIONS[4:]]
        return *((name,) for name in self.delta.names), *of_mlp

    @property
    def in_16_bits(self) -> tuple[str, ...]:
        """The projections that are multiplied in 16 bits, whatever the others are."""
        if not (self.wide_heads and self.int8):
            return ()
        whole = self.fused or self.latent is not None
        return self.of_heads if whole else PROJECTIONS[:2]

    @property
    def of_heads(self) -> tuple[str, ...]:
        """The projections that make q, k and v."""
        return PROJECTIONS[:3] if self.latent is None else ("q", "kv", *self.latent.raised)

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections of a layer, with a mixture's as one expert."""
        return (*self.of_heads, *PROJECTIONS[3:])

    @property
    def storage_of_stacks(self) -> str:
        """How a mixture's experts are stored: in 4 bits as the linear weights, or plain; in 4 bits where some are."""
        if self.stack_tensors:
            return "nf4"
        return self.storage.split(" in ")[0] if self.storage.startswith("nf4") else self.dtype

    @property
    def _kinds(self) -> Iterator[tuple[bool, bool]]:
        """Of each layer, whether it is without a mixture, and whether its attention is a recurrence."""
        for index in range(self.layers):
            yield self.mixture is None or index < self.dense_layers, self.is_recurrent(index)

    def is_recurrent(self, index: int) -> bool:
        """Whether a layer is one of `delta`."""
        return self.delta is not None and self.delta.kinds[index]

    def _linears(self, plain: bool, recurrent: bool) -> Iterator[tuple[int, int, int]]:
        """(out, in, rank) of the linear modules of a layer, without a shared expert's."""
        for names in self.modules_of(recurrent):
            yield *self.module_linear(names), self.rank(*names)
        if plain and self.mixture is not None:
            h, i = self.hidden, self.intermediate
            yield from ((i, h, self.rank("gate")), (i, h, self.rank("gate")), (h, i, self.rank("down")))

    def _stacks(self, plain: bool) -> Iterator[tuple[int, int, int]]:
        """(elements, rank, out + in of all experts) of the stacks of one layer."""
        mixture = self.mixture
        if mixture is None or plain:
            return
        for name, (out, width) in mixture.sizes(self.hidden).items():
            yield mixture.experts * out * width, mixture.ranks[name], mixture.experts * (out + width)

    def module_linear(self, names: tuple[str, ...]) -> tuple[int, int]:
        """(out, in) of a module."""
        return sum(self.linear(name)[0] for name in names), self.linear(names[0])[1]

    def rank(self, *names: str) -> int:
        """Summed adapter ranks of some projections."""
        return sum(self.ranks.get(name, 0) for name in names)

    def linear_parameters(self, *names: str) -> int:
        """Weights of some projections of one layer."""
        return sum(out * width for out, width in (self.linear(name) for name in names))

    @property
    def adapter_parameters(self) -> int:
        """Trained adapter elements of the model."""
        return sum(
            sum(rank * (out + width) for out, width, rank in self._linears(plain, recurrent))
            + sum(rank * sides for _, rank, sides in self._stacks(plain))
            for plain, recurrent in self._kinds
        )

    @property
    def parameters(self) -> int:
        """Elements of the model without adapters."""
        layers = sum(
            sum(out * width for out, width, _ in self._linears(plain, recurrent))
            + sum(size for size, _, _ in self._stacks(plain))
            for plain, recurrent in self._kinds
        )
        return sum(size for size, _ in self._dense_tensors()) + layers

    @cached_property
    def widths(self) -> LayerWidths:
        """What the save levels' declared bytes depend on."""
        mixture, latent = self.mixture, self.latent
        raised = () if latent is None else latent.raised
        # A mixture whose logits are fp32 has two elements of 16 bits for each.
        of_logits = 1 if mixture is None or not mixture.wide_logits else 4 // self.element
        return LayerWidths(
            hidden=self.hidden,
            q=self.q,
            kv=self.kv,
            heads=self.heads,
            intermediate=self.intermediate if mixture is None else mixture.top_k * mixture.intermediate,
            attention_ranks=self._attention_ranks - self.rank(*raised),
            glu_ranks=self.rank("gate", "up", "down")
            if mixture is None
            else mixture.top_k * sum(mixture.ranks.values()),
            router=0 if mixture is None else mixture.experts * of_logits,
            element=self.element,
            residual_element=self.residual_element,
            output_norms=self.output_norms,
            parallel=self.parallel,
            pre_norms=self.pre_norms,
            codes=self._codes,
            raised=0 if latent is None else self._raised_heads + self.rank(*raised),
        )

    @property
    def _attention_ranks(self) -> int:
        """Summed ranks of a layer's attention; where there are two kinds, of the one that has more."""
        of_rule = 0 if self.delta is None else self.rank(*self.delta.names)
        return max(self.rank(*self.of_heads, "o"), of_rule)

    @property
    def _codes(self) -> int | None:
        """What is kept in place of q, k, v and the output (`LayerWidths.codes`); where there are two kinds of layers,
        of the one that keeps more."""
        if self.latent is not None:
            return sum(self.linear(n)[0] for n in ("q", "kv")) + self.linear("o")[1]
        usual = (3 if self.gated else 2) * self.q + 2 * self.kv
        if self.delta is not None:
            return max(usual, sum(self.delta.inputs.values()) + self.delta.wide)
        return usual if self.gated else None

    @property
    def _raised_heads(self) -> int:
        """Elements of q, k and v that are made of codes."""
        assert self.latent is not None
        return (2 if self.latent.q_code else 1) * self.q + self.linear("o")[1]

    @property
    def quantised(self) -> bool:
        """Whether the weights are stored in fewer bits than they are computed in."""
        return self.storage.startswith(("nf4", "bitsandbytes", "int8", "fp8"))

    @property
    def int8(self) -> bool:
        """Whether all products multiply int8 codes, which add an adapter's share themselves."""
        return self.storage.startswith("int8") or self.storage.endswith(IN_INT8)

    @property
    def four_bit_in_int8(self) -> bool:
        """Whether int8 codes are made of 4-bit weights for every product."""
        return self.storage.endswith(IN_INT8)

    @property
    def makes_unit(self) -> bool:
        """Whether one product gives gate, up and act, and another takes their gradients through them."""
        plain = not self.eight_bit_forward and not self.fp8_backward and not self.unpacked_forward
        apart = self.mixture is None and not self.fused_gate_up
        return self.unit_in_products and plain and apart and self.element == 2

    @property
    def plain_products(self) -> bool:
        """Whether products multiply 16-bit weights as they lie."""
        ready = not self.eight_bit_forward and not self.fp8_backward
        return ready and not self.unpacked_forward and not self.unpacked_backward and self.element == 2

    @property
    def eight_bit_forward(self) -> bool:
        """Whether X Wᵀ multiplies 8-bit codes of both."""
        return self.int8 or self.fp8_forward

    @property
    def fp8_forward(self) -> bool:
        """Whether X Wᵀ multiplies e4m3 codes of both."""
        return self.storage.startswith("fp8") or self.storage.endswith(IN_FP8)

    @property
    def fp8_backward(self) -> bool:
        return self.fp8_forward or self.storage.endswith(GRAD_IN_FP8)

    @property
    def unpacked_forward(self) -> int:
        """Bytes per weight of a buffer that the stored weight is unpacked into for X Wᵀ."""
        if self.storage.endswith((IN_FP8, IN_INT8)):
            return 1
        dense = ELEMENT.get(self.storage.removesuffix(GRAD_IN_FP8))
        if self.storage in ("nf4", "nf4 double", "bitsandbytes int8") or (
            dense is not None and dense != self.element
        ):
            return self.element
        return 0

    @property
    def multiplied(self) -> str:
        """How weights are stored that are what the products multiply: for 4-bit ones, what they are expanded to."""
        if self.storage.endswith(IN_FP8):
            return "fp8 two"
        if self.storage.endswith(IN_INT8):
            return "int8 two"
        return self.dtype if self.storage.startswith("nf4") else self.storage

    @property
    def hands_on(self) -> bool:
        """Whether the norm's backward makes the codes of dY for the output projection."""
        return self.storage in ("fp8", "fp8 two", "int8 two") or self.storage.endswith(IN_INT8)

    @property
    def turns_back(self) -> bool:
        """Whether an int8 input gradient is turned back at its end: that of a single set of codes."""
        return self.storage == "int8"

    @property
    def unpacked_backward(self) -> int:
        """The same for dY W; a single set of codes is transposed for it."""
        if self.storage in ("fp8", "int8"):
            return 1
        return 0 if self.storage.endswith(GRAD_IN_FP8) else self.unpacked_forward

    def _dense_tensors(self) -> Iterator[tuple[int, int]]:
        """(elements, bytes) of everything but the layers' linear weights."""
        e = self.element
        sizes = [
            self.vocabulary * self.hidden,
            *([] if self.tied else [self.vocabulary * self.hidden]),
            self.hidden,
        ]
        for plain, recurrent in self._kinds:
            sizes += [self.hidden] * (2 * self.output_norms + (2 - self.parallel) * self.pre_norms)
            of_heads = [self.q, self.kv] if self.norms_of_all_heads else [self.head_dim] * 2
            sizes += of_heads if self.qk_norm and not recurrent else []
            if recurrent:
                sizes += self._delta_tensors()
            elif self.latent is not None:
                of_q = [self.latent.q_code] if self.latent.q_code else []
                sizes += [*of_q, self.latent.kv_code]
                sizes += [*of_q, self.linear("kv")[0], self.hidden] if self.qkv_bias else []
            elif self.qkv_bias:
                sizes += [self.q, self.kv, self.kv]
            if self.mixture is not None and not plain:
                sizes += [self.mixture.experts * self.hidden, 3 * self.mixture.shared * self.hidden]
        yield from ((size, size * e) for size in sizes)

    def _delta_tensors(self) -> list[int]:
        """Elements of the convolution, the gates' two vectors and the norm of the rule's output."""
        delta = self.delta
        assert delta is not None
        return [delta.mixed * delta.conv, delta.values, delta.values, delta.value_dim]

    def weight_tensors(self) -> Iterator[int]:
        """Bytes of every tensor that holds the model's weights, where they are in this process."""
        if self.elsewhere:
            return
        separate = bool(self.layer_storages or self.linear_tensors or self.stack_tensors)
        if (self.storage in ELEMENT and not separate) or (self.gathered and self.storage.startswith("nf4")):
            # Transformers asks for all plain ones at once before it reads them, so that they lie in one segment; in
            # common buffers they do so again.
            yield sum(self._separate_weights())
        else:
            yield from self._separate_weights()

    def _separate_weights(self) -> Iterator[int]:
        yield from (size for _, size in self._dense_tensors())
        yield from (*self.linear_tensors, *self.stack_tensors)
        storages = self.layer_storages or (self.storage,) * self.layers
        for storage, (plain, recurrent) in zip(storages, self._kinds, strict=True):
            for out, width, _ in self._linears(plain, recurrent) if not self.linear_tensors else ():
                yield from stored_tensors(out, width, storage)
            for size, _, _ in self._stacks(plain) if not self.stack_tensors else ():
                yield from stored_tensors(1, size, self.storage_of_stacks)

    @property
    def copied_adapter_parameters(self) -> int:
        """Adapter elements with a 16-bit copy beside them: those of one flat tensor, not those of experts."""
        return self.adapter_parameters - sum(self._stacked_adapters()) if self.packed else 0

    def laid_out_tensors(self) -> Iterator[int]:
        """Bytes of adapters and of the gradients of all that is trained, which live from step to step."""
        if self.trained == "all":
            yield from (size * self.element for size in self._trained_weights())
            return
        if not self.adapter_parameters:
            return
        stacked = list(self._stacked_adapters())
        for size in stacked:
            yield from (size * 4, size * 4)
        if self.packed:
            total = self.adapter_parameters - sum(stacked)
            yield from (total * 4, total * 4, total * self.element)
            return
        for size in self._sides():
            yield from (size * 4, size * 4)

    def optimizer_tensors(self) -> Iterator[int]:
        """Bytes of the optimizer's two states of all that is trained."""
        if self.trained == "all":
            sizes, element = self._trained_weights(), self.element
        else:
            sizes, element = chain(self._stacked_adapters(), self._sides()), self.state_element
        for size in sizes:
            yield from (size * element,) * 2

    def _trained_weights(self) -> Iterator[int]:
        """Elements of every weight of the model."""
        yield from (size for size, _ in self._dense_tensors())
        for plain, recurrent in self._kinds:
            yield from (out * width for out, width, _ in self._linears(plain, recurrent))
            yield from (size for size, _, _ in self._stacks(plain))

    def _stacked_adapters(self) -> Iterator[int]:
        """Elements of the adapters of every stack of experts."""
        yield from (rank * sides for plain, _ in self._kinds for _, rank, sides in self._stacks(plain))

    def _sides(self) -> Iterator[int]:
        """Elements of every A and every B."""
        for plain, recurrent in self._kinds:
            for *sides, rank in self._linears(plain, recurrent):
                yield from (rank * width for width in sides if rank)
