"""Around TRL's `SFTTrainer.__init__`: what it must not see, and what it changes that must stay as it was."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.training.arguments import usable_optimizer
from pronghorn.training.config import AUTO, DEFAULT_MAX_LENGTH, SFTConfig

logger = logging.getLogger("pronghorn")

#: What these ask for is done by our own trainer; TRL would refuse it for our batches or do it its own way.
HIDDEN: dict[str, Any] = {
    "packing": False,
    "eval_packing": None,
    "padding_free": False,
    "assistant_only_loss": False,
    "gradient_checkpointing": False,
    "activation_checkpointing": False,
}


def watch_first_evaluation(args: SFTConfig, eval_dataset: Any) -> None:
    """With several evaluation sets the first one's loss is what `stop_early` goes by, unless another metric is
    given."""
    if args.stop_early and isinstance(eval_dataset, dict) and "metric_for_best_model" not in args.given:
        args.metric_for_best_model = f"eval_{next(iter(eval_dataset))}_loss"


def settle_arguments(args: SFTConfig, model: Any, *, own_collator: bool) -> None:
    """Values that depend on the machine, the model or each other, before TRL sees them.

    Args:
        own_collator: the user brings the collator.
    """
    args.optim = usable_optimizer(str(getattr(args.optim, "value", args.optim)))
    resolve_max_length(args, model)
    use_one_gpu(args, model)
    match_precision(args, model)
    args.accelerator_config.non_blocking = args.dataloader_pin_memory
    if args.accelerator_config.dispatch_batches is None and not own_collator:
        # One process would read for all and cut a stream's batch, which is one row, into pieces.
        args.accelerator_config.dispatch_batches = False
    if args.packing and "wrapped" in str(args.packing_strategy):
        logger.warning(
            "pronghorn: packing_strategy='wrapped' would cut documents; packing here keeps each whole"
        )


@contextmanager
def hidden(args: SFTConfig) -> Iterator[None]:
    """Show TRL the neutral values of `HIDDEN`, and the user's again afterwards."""
    shown = {name: getattr(args, name) for name in HIDDEN if hasattr(args, name)}
    for name in shown:
        setattr(args, name, HIDDEN[name])
    try:
        yield
    finally:
        for name, value in shown.items():
            setattr(args, name, value)


@contextmanager
def model_as_it_is(model: Any) -> Iterator[None]:
    """Take back what TRL does to a model: a fused head over `forward`, and adapters of a quantised model cast to bf16.

    Adapters stay in float32 because an Adam step is smaller than bf16 can resolve; the engine computes in the model's
    dtype whatever they are stored in. TRL's fused head knows no adapter on lm_head and would refuse one; ours does, so
    TRL is shown the layer under it.
    """
    if isinstance(model, str):
        yield
        return
    base = base_causal_lm(model)
    forward = base.__dict__.get("forward")
    stored = [(p, p.data) for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    head = base.get_output_embeddings()
    adapted = isinstance(head, BaseTunerLayer)
    if adapted:
        base.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        if adapted:
            del base.get_output_embeddings
        restore_forward(base, forward)
        for parameter, data in stored:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)


def restore_forward(base: Any, forward: Any = None) -> None:
    """Put back the forward a model had before TRL laid its fused head over it; None: that of its class."""
    if forward is None:
        base.__dict__.pop("forward", None)
    else:
        base.forward = forward


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a loaded model embeds, where its configuration says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def is_bound(model: Any) -> bool:
    """Whether the engine runs this model."""
    binding = binding_of(model)
    return binding is not None and binding.bound


def resolve_max_length(args: SFTConfig, model: Any) -> None:
    """Settle `args.max_length`: "auto" becomes a number, and nothing is longer than the model's `max_seq_length`."""
    context = getattr(model, "max_seq_length", None)
    if args.max_length == AUTO:
        args.max_length = context or DEFAULT_MAX_LENGTH
    elif args.max_length is not None and context is not None and int(args.max_length) > context:
        logger.warning(
            "pronghorn: max_length=%s is more than the %d tokens the model was loaded for (max_seq_length); "
            "rows are cut to %d", args.max_length, context, context,
        )  # fmt: skip
        args.max_length = context


def use_one_gpu(args: Any, model: Any, *, in_processes: bool = True) -> None:
    """A process that sees several GPUs trains on the first: Transformers would copy the model to all of them and cut
    each batch between threads (`nn.DataParallel`), which is slower than one GPU, and TRL refuses it.

    Args:
        in_processes: several processes can train it together.
    """
    if args.n_gpu > 1:
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            return  # its layers are spread over them, which Transformers sees to
        reason = f"training on one of {args.n_gpu} GPUs"
        if in_processes:
            reason += f"; with `torchrun --nproc-per-node {args.n_gpu}` each has its rows"
        binding = binding_of(model)
        if binding is None:
            logger.warning("pronghorn: %s", reason)
        else:
            binding.tell_once(reason)  # a search trains the same model many times
        args._n_gpu = 1


def match_precision(args: SFTConfig, model: Any) -> None:
    """Loss scaling for a float16 model with float32 adapters, which training in float16 cannot do without."""
    if args.fp16 or args.bf16 or isinstance(model, str) or args.device.type != "cuda":
        return
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if getattr(model, "dtype", None) == torch.float16 and trained == {torch.float32}:
        args.fp16, args.mixed_precision = True, "fp16"
        logger.warning("pronghorn: the model is float16: gradients are scaled (fp16=True)")


def take_over_checkpointing(args: SFTConfig, model: Any, asked: bool) -> None:
    """`gradient_checkpointing=True` on a bound model chooses its lowest save level; elsewhere Transformers does it."""
    ours = is_bound(model)
    if ours and asked:
        binding_of(model).set_save_levels("none")  # type: ignore[union-attr]
    own = asked and not ours
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(args, name):
            setattr(args, name, own)
    if own:
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if hasattr(args, name):
                setattr(args, name, {"use_reentrant": False, **(getattr(args, name) or {})})


def takes_flat_batches(model: Any) -> bool:
    """Whether a model keeps documents of one flat stream apart: a bound one, or flash attention in Transformers."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False  # PEFT puts its virtual tokens in front of rows, where each document needs them
    if is_bound(model):
        return True
    base = base_causal_lm(model)
    attention = str(getattr(base.config, "_attn_implementation", "") or "")
    parameters = inspect.signature(type(base).forward).parameters.values()
    passes_on = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return passes_on and ("flash_attention" in attention or "flash-attn" in attention)
