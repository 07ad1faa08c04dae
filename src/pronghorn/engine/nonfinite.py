"""Where a batch's numbers stop being numbers: the first tensor, its layer, and the token.

The batch is run again, eagerly and layer by layer, with a look at every tensor that a layer makes, in the order it
makes them; and where the loss is finite, backward from the loss to the first layer in the same way. A tensor is blamed
only when everything before it was finite, and a weight before what was computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.engine.bind import binding_of
from pronghorn.engine.binding import Binding, base_causal_lm
from pronghorn.engine.forward import build_layer, readable_head
from pronghorn.engine.layer_call import LayerCall
from pronghorn.engine.loss import shifted_loss, without_padding
from pronghorn.engine.read import active_module, dropout_seed, read_norm
from pronghorn.engine.stream import Stream, flatten_rows, unflatten_rows
from pronghorn.families import MOE, LayerParts
from pronghorn.weights import read_weight

#: Rows of logits that are looked at together.
_ROWS = 256


@dataclass(frozen=True)
class Finding:
    """The first tensor with a value that is no finite number.

    Args:
        tensor: its name, as `named_parameters` calls it where it is a parameter.
        kind: "weight", "activation", "loss" or "gradient".
        layer: of the decoder; None outside of the layers.
        value: "nan", "inf" or "-inf".
        count: how many such values the tensor has.
        largest: the largest finite magnitude beside them.
        dtype: of the tensor.
        index: of the first such value in a weight.
        row: which of the batch's rows (documents of a packed stream), from 0, where the tensor has rows of tokens.
        position: the token's place in that row, from 0.
        token: its id.
    """

    tensor: str
    kind: str
    layer: int | None
    value: str
    count: int
    largest: float
    dtype: str
    index: tuple[int, ...] | None = None
    row: int | None = None
    position: int | None = None
    token: int | None = None

    @property
    def overflowed(self) -> bool:
        """Whether the other numbers are so near the end of float16 that these went beyond it."""
        return self.kind != "weight" and self.dtype == "float16" and self.largest > 8192

    def __str__(self) -> str:
        where = "" if self.index is None else f" (first at {list(self.index)})"
        many = f"{self.count:,} values that are" if self.count > 1 else "a value that is"
        return f"{self.tensor} has {many} {self.value}{where}"


def find_nonfinite(
    model: Any,
    batch: Mapping[str, Any],
    *,
    normalizer: Any = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Finding | None:
    """Run a batch again and name the first tensor that is not finite; None where all are.

    Gradients and the model stay as they are. A bound model is looked into layer by layer, any other one, and one that
    reads images, module by module, which finds gradients by parameter only.

    Args:
        model: a causal LM, or the PEFT model around it.
        batch: what the model is called with in training, labels included.
        normalizer: divides the loss; None: the number of supervised tokens.
        around: context in which the model is called (autocast).
    """
    binding = binding_of(model)
    devices = [d for d in {p.device for p in model.parameters()} if d.type == "cuda"]
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=devices), around():
            if binding is not None and binding.bound and not binding.family.reads_images:
                found = _Layers(binding, batch, normalizer).search()
            else:
                found = _search_modules(model, batch)
    finally:
        model.train(training)
    return found if found is None else _named(model, found)


def _named(model: Any, found: Finding) -> Finding:
    """A parameter of the model inside, by the name it has in `model`."""
    if found.kind not in ("weight", "gradient") or model is base_causal_lm(model):
        return found
    inner = {id(p): name for name, p in model.named_parameters()}
    parameter = dict(base_causal_lm(model).named_parameters()).get(
        found.tensor.removeprefix("the gradient of ")
    )
    if parameter is None or id(parameter) not in inner:
        return found
    name = inner[id(parameter)]
    return replace(found, tensor=f"the gradient of {name}" if found.kind == "gradient" else name)


# --- a bound model -------------------------------------------------------------------------------------------------


@dataclass
class _Layers:
    """The bound decoder's forward and backward over one batch, tensor by tensor."""

    binding: Binding
    batch: Mapping[str, Any]
    normalizer: Any
    _kept: Tensor | None = None

    def search(self) -> Finding | None:
        model = self.binding.model
        decoder, ids = model.model, self.batch["input_ids"]
        with torch.no_grad():
            embedded = active_module(decoder.embed_tokens)(ids) * self.binding.scales.embedding
        extra = {name: value for name, value in self.batch.items() if name not in ("input_ids", "labels")}
        mask, positions = extra.pop("attention_mask", None), extra.pop("position_ids", None)
        hidden, stream = flatten_rows(embedded, mask, positions, extra)
        self._kept = stream.kept
        found = self._embedding(hidden)
        if found is not None:
            return found
        call = LayerCall.of(self.binding, hidden, stream, dropout_seed(True))
        inputs = []
        for layer in decoder.layers[: decoder.config.num_hidden_layers]:
            inputs.append(hidden)
            found, hidden = self._forward(layer, call, hidden)
            if found is not None:
                return found
        found, dhidden = self._head(hidden, stream)
        if found is not None or dhidden is None:
            return found
        return self._backward(call, inputs, dhidden)

    def _embedding(self, hidden: Tensor) -> Finding | None:
        if _finite(hidden):
            return None
        module = active_module(self.binding.decoder.embed_tokens)
        weight = next((p for p in module.parameters() if p.dim() == 2), None)
        row = int(_first_row(hidden))
        token = int(self.batch["input_ids"].reshape(-1)[row if self._kept is None else self._kept[row]])
        name = self._name_of(weight)
        if weight is None or _finite(weight[token]):
            return self._activation("the embedded tokens", None, hidden)
        found = _finding(name, "weight", None, weight.detach()[token])
        found = replace(found, index=(token, *(found.index or ())))
        return self._at_token(found, row)

    def _forward(self, layer: Any, call: LayerCall, hidden: Tensor) -> tuple[Finding | None, Tensor]:
        """What is wrong in one layer, and its output."""
        index = self.binding.layer_index(layer)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            out, saves = build_layer(layer, call).forward(hidden, "all")
        if _finite(out):
            return None, out
        parts, attention, glu = self.binding.family.parts.of(layer), saves.attention, saves.glu
        stages = [
            (parts.input_norm, "output of", glu.normed if parts.side_by_side else attention.normed),
            *_head_stages(parts, attention),
            (f"{parts.attention}", "attention of", attention.out),
            (f"{parts.attention}.{parts.o}", "output of", attention.projected),
            (parts.attention_output_norm or f"{parts.attention}.{parts.o}", "residual sum after", glu.summed),
            (parts.mlp_norm or parts.input_norm, "output of", glu.normed),
            *self._mlp_stages(layer, glu, out),
        ]
        prefix = self._name_of_module(layer)
        looked_at: list[nn.Module] = []
        for name, what, tensor in stages:
            if name is None:  # a norm that the family has not
                continue
            looked_at.append(layer.get_submodule(name))
            if tensor is None or _finite(tensor):
                continue
            for module in looked_at:
                weight = self._bad_weight(module, index)
                if weight is not None:
                    return self._at_token(weight, int(_first_row(tensor))), out
            return self._activation(f"the {what} {prefix}.{name}", index, tensor), out
        raise AssertionError("the layer's output is its last stage")

    def _mlp_stages(self, layer: Any, saves: Any, out: Tensor) -> list[tuple[str, str, Tensor | None]]:
        """What the second half of a layer makes after its norm, in this order."""
        parts, mixture = self.binding.family.parts, self.binding.family.mixture
        if mixture is not None and self.binding.mlp_of(layer) == MOE:
            experts = f"{parts.mlp}.{mixture.experts}"
            return [
                (f"{parts.mlp}.{mixture.router}", "output of", saves.logits),
                (experts, "gate and up of", saves.gate_up),
                (parts.mlp, "residual sum after", out),
            ]
        gate, up = (parts.gate, parts.up) if parts.gate_up is None else (parts.gate_up,) * 2
        return [
            (f"{parts.mlp}.{gate}", "output of", saves.gate),
            (f"{parts.mlp}.{up}", "output of", saves.up),
            (f"{parts.mlp}.{parts.down}", "output of", saves.projected),
            (parts.mlp_output_norm or f"{parts.mlp}.{parts.down}", "residual sum after", out),
        ]

    def _bad_weight(self, module: nn.Module, layer: int | None) -> Finding | None:
        """The first weight of a module that is not finite, quantised ones by what they stand for."""
        for name, part in module.named_modules():
            for own, parameter in part.named_parameters(recurse=False):
                dense: Tensor | None = parameter.detach()
                if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
                    stored = read_weight(part) if own == "weight" else None
                    dense = None if stored is None else stored.dense(torch.float32)
                if dense is not None and not _finite(dense):
                    prefix = self._name_of_module(module)
                    full = ".".join(part for part in (prefix, name, own) if part)
                    return _finding(full, "weight", layer, dense)
        return None

    def _head(self, hidden: Tensor, stream: Stream) -> tuple[Finding | None, Tensor | None]:
        """The final norm, the logits and the loss; and the gradient of the last layer's output where all is finite."""
        model = self.binding.model
        head = readable_head(model, self.binding)
        norm = read_norm(model.model.norm, self.binding.family.norm_offset)
        norm = replace(norm, weight=norm.weight.detach())
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = norm(leaf)
        if not _finite(normed):
            bad = self._bad_weight(model.model.norm, None)
            return bad or self._activation("the output of the final norm", None, normed), None
        labels, mask = self.batch.get("labels"), self.batch.get("attention_mask")
        if head is None or labels is None:
            return None, None
        labels = labels if mask is None else without_padding(labels, mask)
        with torch.enable_grad():
            rows = unflatten_rows(normed, stream)
            loss, _ = shifted_loss(
                head,
                rows,
                labels,
                self.batch.get("loss_rows"),
                self.normalizer,
                scales=self.binding.scales,
            )
        if not _finite(loss):
            return self._loss(rows.detach().reshape(labels.numel(), -1), labels), None
        if not loss.requires_grad:
            return None, None
        (dhidden,) = torch.autograd.grad(loss, leaf)
        if not _finite(dhidden):
            return self._activation(
                "the gradient of the last layer's output", None, dhidden, "gradient"
            ), None
        return None, dhidden

    def _loss(self, normed: Tensor, labels: Tensor) -> Finding:
        """A row of logits that is not finite, or the loss itself."""
        lm_head = active_module(self.binding.model.lm_head)
        bad = self._bad_weight(lm_head, None)
        successors = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        supervised = (successors != -100).nonzero().squeeze(1)
        with torch.no_grad():
            for rows in supervised.split(_ROWS):
                logits = lm_head(normed.index_select(0, rows))
                if not _finite(logits):
                    found = bad or replace(_finding("the logits", "activation", None, logits), index=None)
                    return self._at_place(found, int(rows[_first_row(logits)]))
        found = Finding("the loss", "loss", None, "nan", 1, 0.0, "float32")
        return bad or found

    def _backward(self, call: LayerCall, inputs: list[Tensor], dhidden: Tensor) -> Finding | None:
        """Layer by layer from the last to the first: gradients of its parameters, then of its input."""
        decoder = self.binding.decoder
        layers = list(decoder.layers[: decoder.config.num_hidden_layers])
        for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
            index = self.binding.layer_index(layer)
            ready = build_layer(layer, call)
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                out = ready(leaf)
            wanted = [leaf, *ready.parameters]
            grads = torch.autograd.grad(out, wanted, dhidden, allow_unused=True)
            if grads[0] is not None and not _finite(grads[0]):
                name = f"the gradient of the input of {self._name_of_module(layer)}"
                return self._activation(name, index, grads[0], "gradient")
            for parameter, grad in zip(ready.parameters, grads[1:], strict=True):
                if grad is not None and not _finite(grad):
                    return _finding(f"the gradient of {self._name_of(parameter)}", "gradient", index, grad)
            assert grads[0] is not None
            dhidden = grads[0]
        return None

    def _activation(self, name: str, layer: int | None, tensor: Tensor, kind: str = "activation") -> Finding:
        found = replace(_finding(name, kind, layer, tensor), index=None)
        return self._at_token(found, int(_first_row(tensor)))

    def _at_token(self, found: Finding, index: int) -> Finding:
        """With the row, the place in it and the id of token `index` of the stream, from which padding is gone."""
        return self._at_place(found, index if self._kept is None else int(self._kept[index]))

    def _at_place(self, found: Finding, flat: int) -> Finding:
        """The same for a place among the batch's tokens [B · S]."""
        ids = self.batch["input_ids"]
        offsets = self.batch.get("cu_seq_lens_q")
        if offsets is None:
            row, position = divmod(flat, ids.shape[-1])
        else:
            starts = offsets.tolist()
            row = max(i for i, start in enumerate(starts[:-1]) if start <= flat)
            position = flat - starts[row]
        return replace(found, row=row, position=position, token=int(ids.reshape(-1)[flat]))

    def _name_of(self, parameter: Tensor | None) -> str:
        names = (name for name, p in self.binding.model.named_parameters() if p is parameter)
        return next(names, "a weight")

    def _name_of_module(self, module: nn.Module) -> str:
        names = (name for name, m in self.binding.model.named_modules() if m is module)
        return next(names, type(module).__name__)


# --- any model -----------------------------------------------------------------------------------------------------


def _search_modules(model: Any, batch: Mapping[str, Any]) -> Finding | None:
    """The first module whose inputs are finite and whose output is not; else the first gradient that is not."""
    first: list[Finding] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if first or not all(map(_finite, _tensors((args, kwargs)))):
            return
        bad = next((t for t in _tensors(output) if not _finite(t)), None)
        if bad is None:
            return
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and not _finite(parameter):
                full = f"{names[module]}.{name}"
                first.append(_at(_finding(full, "weight", None, parameter.detach()), bad, batch))
                return
        found = replace(_finding(f"the output of {names[module]}", "activation", None, bad), index=None)
        first.append(_at(found, bad, batch))

    # Containers are looked at through what they contain.
    leaves = [module for module in names if not any(module.children())]
    handles = [module.register_forward_hook(look, with_kwargs=True) for module in leaves]
    known = {name: value for name, value in batch.items() if name not in ("loss_rows", "document_lengths")}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            loss = model(**known, use_cache=False).loss
        if not first and loss is not None and loss.requires_grad and _finite(loss):
            grads = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
            for (name, _), grad in reversed(list(zip(trained, grads, strict=True))):
                if grad is not None and not _finite(grad):
                    return _finding(f"the gradient of {name}", "gradient", None, grad)
    finally:
        for handle in handles:
            handle.remove()
    if first:
        return first[0]
    if loss is not None and not _finite(loss):
        return Finding("the loss", "loss", None, _word(loss), 1, 0.0, str(loss.dtype).removeprefix("torch."))
    return None


def _at(found: Finding, tensor: Tensor, batch: Mapping[str, Any]) -> Finding:
    """With row and token, where the tensor has the batch's rows [B, S, ...]."""
    ids = batch.get("input_ids")
    if ids is None or tensor.dim() < 2 or tensor.shape[:2] != ids.shape[:2]:
        return found
    row, position = divmod(int(_first_row(tensor.reshape(ids.numel(), -1))), ids.shape[1])
    return replace(found, row=row, position=position, token=int(ids[row, position]))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in arguments and outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


# --- one tensor ----------------------------------------------------------------------------------------------------


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _first_row(tensor: Tensor) -> Tensor:
    """The first row of [T, ...] with a value that is not finite."""
    bad = ~torch.isfinite(tensor).reshape(tensor.shape[0], -1).all(1)
    return bad.int().argmax()


def _word(tensor: Tensor) -> str:
    """What the first value that is not finite is: nan, inf or -inf."""
    flat = tensor.detach().reshape(-1)
    value = float(flat[(~torch.isfinite(flat)).int().argmax()])
    return "nan" if value != value else "inf" if value > 0 else "-inf"


def _finding(name: str, kind: str, layer: int | None, tensor: Tensor) -> Finding:
    tensor = tensor.detach()
    bad = ~torch.isfinite(tensor)
    flat = int(bad.reshape(-1).int().argmax())
    index = []
    for size in reversed(tensor.shape):
        flat, place = divmod(flat, size)
        index.append(place)
    largest = tensor.masked_fill(bad, 0).abs().max() if tensor.numel() else tensor.new_zeros(())
    return Finding(
        tensor=name,
        kind=kind,
        layer=layer,
        value=_word(tensor),
        count=int(bad.sum()),
        largest=float(largest),
        dtype=str(tensor.dtype).removeprefix("torch."),
        index=tuple(reversed(index)),
    )


def _head_stages(parts: LayerParts, saves: Any) -> list[tuple[str, str, Tensor | None]]:
    """What makes q, k and v, in this order."""
    latent, delta = parts.latent, parts.delta
    if delta is not None:
        # Two modules give what four do elsewhere.
        inputs = (
            delta.inputs if len(delta.inputs) == 4 else tuple(name for name in delta.inputs for _ in range(2))
        )
        found = list(zip(inputs, (saves.mixed, saves.z, saves.b, saves.a), strict=True))
        found += [(delta.conv, None), (delta.norm, None)]
    elif latent is None:
        q, k, v = (parts.q, parts.k, parts.v) if parts.qkv is None else (parts.qkv,) * 3
        found = [(q, saves.q), (k, saves.k), (v, saves.v)]
    else:
        found = [(latent.q, saves.q if latent.q_up is None else saves.code_q), (latent.kv, saves.code_kv)]
        if latent.q_norm is not None and latent.q_up is not None:
            found += [(latent.q_norm, None), (latent.q_up, saves.q)]
        found += [(latent.kv_norm, None), (latent.kv_up, saves.k), (latent.kv_up, saves.v)]
    return [(f"{parts.attention}.{name}", "output of", tensor) for name, tensor in found]
