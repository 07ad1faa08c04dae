"""`FastLanguageModel`: load a model, put an adapter on it, switch between training and answering."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from pronghorn.blocks.levels import check_level
from pronghorn.engine import AUTO, base_causal_lm, bind
from pronghorn.errors import UnsupportedCheckpoint
from pronghorn.hardware import probe
from pronghorn.importing import collector_paused
from pronghorn.kernels.attention import check_name
from pronghorn.loading.adapter_settings import refuse_other_kinds
from pronghorn.loading.adapters import (
    ALL_LINEAR,
    DEFAULT_TARGETS,
    add_adapter,
    load_adapter,
    lora_config_fields,
)
from pronghorn.loading.ahead import begun_early
from pronghorn.loading.arguments import (
    NO_EFFECT_ON_ADAPTERS,
    NO_EFFECT_ON_LOADING,
    note_without_effect,
    refuse_no_length,
    refuse_other_than,
    refuse_pair,
    refuse_unknown,
)
from pronghorn.loading.choices import AskedFp8, AskedInt8, AskedStorage, choose_options
from pronghorn.loading.hub import download
from pronghorn.loading.model import Options, check_files, gpu_in_sight, load_config, load_model
from pronghorn.loading.precision import choose_dtype
from pronghorn.loading.saving import add_save_methods
from pronghorn.loading.source import Source, base_of_adapter, locate
from pronghorn.loading.tokenizer import (
    has_processor,
    has_tokenizer,
    load_processor,
    load_tokenizer,
    set_pad_token,
)
from pronghorn.loading.towers import reads_images, tower_targets
from pronghorn.quantising.settings import DynamicQuantisation

logger = logging.getLogger("pronghorn")


def is_bfloat16_supported() -> bool:
    """Whether a GPU here multiplies bf16 matrices, for `TrainingArguments(bf16=..., fp16=not ...)`.

    False without a GPU, whatever the CPU can do: Transformers refuses `bf16=True` there, while our trainer takes
    `fp16=True` as "the model's own dtype".
    """
    hardware = probe()
    return bool(hardware.is_cuda and hardware.compute_dtype.value == "bfloat16")


def save_level(use_gradient_checkpointing: bool | str) -> str:
    """The save level that a checkpointing request stands for: False keeps all, True keeps each layer's input,
    "unsloth" parks it in host memory; "auto" and level names stand for themselves."""
    if use_gradient_checkpointing == AUTO:
        return AUTO
    if isinstance(use_gradient_checkpointing, str):
        return check_level(use_gradient_checkpointing)
    return "none" if use_gradient_checkpointing else "all"


def bind_with(
    model: Any, use_gradient_checkpointing: bool | str, strict: bool = False, attention: str | None = None
) -> None:
    """Bind the fast path and set its save level; a model that stays stock gets Transformers' own checkpointing."""
    level = save_level(use_gradient_checkpointing)
    binding = bind(model, strict=strict, save_levels=level, attention=attention)
    if binding.bound:
        binding.set_save_levels(level)
        logger.info("%s", binding.describe())
        return
    base = base_causal_lm(model)
    if not getattr(base, "supports_gradient_checkpointing", False):
        return
    if level in (AUTO, "offload", "none"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        base.gradient_checkpointing_disable()


class FastLanguageModel:
    """Loading and adapters with the argument names that Unsloth's users know. All methods are static."""

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = 2048,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_fp8: bool | str = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        device_map: Any = None,
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = AUTO,
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_quant_type: str = "nf4",
        attn_implementation: str | None = None,
        attention: str | None = None,
        strict: bool = False,
        gguf_file: str | None = None,
        fp8_skip_layers: int | None = None,
        fp8_modules: Iterable[str] | None = None,
        fp8_copies: int = 1,
        load_in_int8: bool = False,
        int8_skip_layers: int = 0,
        int8_modules: Iterable[str] | None = None,
        int8_copies: int = 2,
        images: bool | None = False,
        dynamic_4bit: bool | DynamicQuantisation = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a model and its tokenizer, with the fast path bound.

        Args:
            model_name: a hub id, a folder, a .gguf file, or a folder with a PEFT adapter (its base is loaded, too,
                and the adapter can be trained on). bitsandbytes checkpoints stay quantised as they are.
            max_seq_length: the longest row in training; None takes the model's own limit.
            dtype: of weights and matrix products; None lets the hardware decide.
            load_in_4bit: None is 4-bit on a CUDA GPU with bitsandbytes and unquantised elsewhere.
            load_in_fp8: multiply frozen linear layers in 8-bit floating point, labelled quantised. True stores them so,
                too, or in 4 bits together with load_in_4bit=True; "backward" keeps 16-bit weights and an exact forward,
                and runs the input gradients in fp8; "mixed" is True for the layers that `fp8_skip_layers` and
                `fp8_modules` choose and "backward" for the others.
            full_finetuning: train the weights themselves; they are not quantised then.
            rope_scaling: such as {"type": "linear", "factor": 2.0}.
            fix_tokenizer: give the tokenizer a padding token other than EOS where one is to spare.
            use_gradient_checkpointing: "auto" (the trainer chooses by its largest batch and the memory that is free),
                True, False, "unsloth" (layer inputs in host memory) or a save level.
            attn_implementation: of Transformers' own forward, which generation and stock models run.
            attention: of the fast path, by name: "cudnn", "flash", "flex", "cpu", "sdpa" or "eager"; None takes the
                fastest one that does what the model asks for.
            strict: refuse a model that cannot take the fast path, instead of training it on its stock forward.
            fp8_skip_layers: decoder layers at either end that are not chosen; None is 2, for "mixed" a quarter of all,
                for "backward" 0.
            fp8_modules: names of the linear layers to choose, such as ["gate_proj", "up_proj", "down_proj"], which are
                those of "mixed"; None otherwise is all in the decoder layers (never the head).
            fp8_copies: 2 also stores the codes transposed, a byte more a weight for a backward a few per cent faster.
            load_in_int8: store frozen linear layers as 8-bit integers and multiply them so, labelled quantised; with
                load_in_4bit=True they are stored in 4 bits and multiplied so.
            int8_skip_layers: decoder layers at either end that stay as they are.
            int8_modules: names of the linear layers to choose; None is all in the decoder layers (never the head), over
                4 bits all but those of queries and keys.
            int8_copies: 2 stores codes for both directions; 1 takes half the memory and a few per cent more time.
            images: True loads a model that reads images with its processor in the tokenizer's place, as
                `FastVisionModel` does; None does so where the checkpoint has one, as `FastModel` does.
            dynamic_4bit: measure on some rows what 4 bits do to each linear layer, keep those in 16 bits that bear it
                least, and round the others to fit: takes a minute or more. True has the defaults of
                `DynamicQuantisation`; `model.pronghorn_quantisation` is the report.
            kwargs: arguments of older scripts without effect here.

        Returns:
            (model, tokenizer); the model in evaluation mode, `model.max_seq_length` set.

        Raises:
            PronghornError: a subclass for everything that can be wrong with a name, a file or an argument.
        """
        refuse_unknown(kwargs, FastLanguageModel.from_pretrained, NO_EFFECT_ON_LOADING)
        refuse_other_than(kwargs.get("qat_scheme"), (None,), "qat_scheme")
        note_without_effect(kwargs, "from_pretrained")
        refuse_no_length(max_seq_length, "max_seq_length")
        save_level(use_gradient_checkpointing)
        check_name(attention)
        hardware = probe()
        chosen = choose_dtype(dtype, hardware)
        if load_in_4bit is None and (load_in_fp8 or load_in_int8 or dynamic_4bit):
            load_in_4bit = bool(dynamic_4bit)
        storage = AskedStorage(
            load_in_4bit, load_in_8bit, full_finetuning, bnb_4bit_quant_type, bnb_4bit_use_double_quant
        )
        int8 = AskedInt8(load_in_int8, int8_skip_layers, int8_modules, int8_copies)
        fp8 = AskedFp8(load_in_fp8, fp8_skip_layers, fp8_modules, fp8_copies)
        options = replace(
            choose_options(chosen.value, storage, hardware, int8, fp8, dynamic_4bit),
            device_map=device_map,
            rope_scaling=rope_scaling,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            images=images,
        )
        named = locate(model_name, gguf_file=gguf_file, revision=revision)
        logger.info("pronghorn: %s in %s", named.name, chosen)
        model, tokenizer = load_named(
            named,
            options,
            token=token,
            max_seq_length=max_seq_length,
            full_finetuning=full_finetuning,
            fix_tokenizer=fix_tokenizer,
        )
        bind_with(model, use_gradient_checkpointing, strict, attention)
        add_save_methods(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Iterable[str] | None = DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        use_gradient_checkpointing: bool | str = AUTO,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        qat_scheme: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put a new LoRA adapter of stock PEFT on a model; only the adapter is trained.

        Args:
            target_modules: names, "all-linear" or a regular expression; the default is Llama's seven projections, or
                all linear layers where a model has others; embed_tokens and lm_head among them are
                trained whole, as `modules_to_save`. gate_proj, up_proj and down_proj of a mixture of experts
                reach the experts, whose gate and up share one adapter of rank r.
            random_state: seeds the initialisation, without touching the global random state.
            use_gradient_checkpointing: as in `from_pretrained`.
            kwargs: further fields of `peft.LoraConfig`, or arguments of older scripts without effect here.

        Returns:
            a `peft.PeftModel`.

        Raises:
            AdapterProblem: when the model has an adapter already, or PEFT refuses the combination.
            TargetModuleNotFound: for a module that the model does not have.
            UnknownArgument: for an argument or value that does not exist.
        """
        refuse_pair(model)
        passed_on = lora_config_fields()
        refuse_unknown(kwargs, FastLanguageModel.get_peft_model, NO_EFFECT_ON_ADAPTERS | passed_on)
        note_without_effect({k: v for k, v in kwargs.items() if k not in passed_on}, "get_peft_model")
        refuse_no_length(max_seq_length, "max_seq_length")
        refuse_other_than(bias, ("none", "all", "lora_only"), "bias")
        refuse_other_than(qat_scheme, (None,), "qat_scheme")
        refuse_other_kinds(kwargs)
        revision = kwargs.pop("revision", None)
        level = save_level(use_gradient_checkpointing)
        source = model.__dict__.get("pronghorn_source")
        wrapped = add_adapter(
            model,
            random_state,
            revision=revision or getattr(source, "revision", None),
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            **{name: value for name, value in kwargs.items() if name in passed_on},
        )
        if max_seq_length is not None:
            base_causal_lm(wrapped).max_seq_length = max_seq_length
        bind_with(wrapped, level)
        add_save_methods(wrapped)
        return wrapped

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode with the KV cache on; `model.generate` runs on the inference engine. Returns the model."""
        base_causal_lm(model).config.get_text_config().use_cache = True
        # By name: answering stands above loading, which knows nothing of it until somebody asks for it here.
        import_module("pronghorn.inference.model_generate").use_engine(model)
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode; the save level stays unless another is given. `model.generate` is Transformers' own again, and
        the memory of its cache is free. Returns the model."""
        import_module("pronghorn.inference.model_generate").undo_engine(model)
        if use_gradient_checkpointing is not None:
            bind_with(model, use_gradient_checkpointing)
        return model.train()


class FastModel(FastLanguageModel):
    """Unsloth's name for the class that loads any model: one that reads images comes with its processor."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As `FastLanguageModel.from_pretrained`."""
        return FastLanguageModel.from_pretrained(*args, **{"images": None, **kwargs})


class FastVisionModel(FastLanguageModel):
    """Models for images and text: their language model trains on the fast path, the vision tower as Transformers runs
    it."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As `FastLanguageModel.from_pretrained`.

        Returns:
            (model, processor).
        """
        return FastLanguageModel.from_pretrained(*args, **{"images": True, **kwargs})

    @staticmethod
    def get_peft_model(
        model: Any,
        *args: Any,
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As `FastLanguageModel.get_peft_model`, whose `target_modules` goes before the four switches.

        Args:
            finetune_vision_layers: adapters on the vision tower, too, which then keeps what its backward needs.
            finetune_language_layers: adapters on the language model.
            finetune_attention_modules, finetune_mlp_modules: on which linear layers of either.
        """
        refuse_pair(model)
        if len(args) < 2 and kwargs.get("target_modules") in (None, ALL_LINEAR):
            targets = tower_targets(
                model,
                vision=finetune_vision_layers,
                language=finetune_language_layers,
                attention=finetune_attention_modules,
                mlp=finetune_mlp_modules,
                layers=kwargs.get("layers_to_transform"),
            )
            if targets is not None:
                kwargs["target_modules"] = targets
            if isinstance(targets, str):  # in which the numbers of the layers stand already
                kwargs["layers_to_transform"] = None
        return FastLanguageModel.get_peft_model(model, *args, **kwargs)


def _tokenizer_or_processor(here: Source, base: Source, config: Any, options: Options) -> Any:
    """The adapter's own (`here`) where it has one, else the base model's.

    Raises:
        UnsupportedCheckpoint: a processor was asked for, and the model reads no images.
    """
    images, trusted = options.images, options.trust_remote_code
    if images and not reads_images(config):
        raise UnsupportedCheckpoint(
            f"the model ({config.model_type}) reads no images",
            where=base.name,
            fix="load it with FastLanguageModel",
        )
    if images or (images is None and reads_images(config) and (has_processor(here) or has_processor(base))):
        return load_processor(here if has_processor(here) else base, trust_remote_code=trusted)
    return load_tokenizer(here if has_tokenizer(here) else base, trust_remote_code=trusted)


def load_named(
    named: Source,
    options: Options,
    *,
    token: str | bool | None,
    max_seq_length: int | None,
    full_finetuning: bool,
    fix_tokenizer: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint or an adapter, in evaluation mode and not bound yet; for the arguments see
    `FastLanguageModel.from_pretrained`."""
    trusted, hardware = options.trust_remote_code, probe()
    here = on_disk(named, token, trusted)
    base_named = base_of_adapter(here) if here.kind == "adapter" else named
    base_here = on_disk(base_named, token, trusted) if here.kind == "adapter" else here
    with begun_early(check_files(base_here), gpu_in_sight(options.device_map, hardware)):
        with collector_paused():  # both import much of Transformers
            config = load_config(base_here, trusted)
            tokenizer = _tokenizer_or_processor(here, base_here, config, options)
        texts, rows = getattr(tokenizer, "tokenizer", tokenizer), None
        if options.dynamic is not None:
            from pronghorn.quantising.calibration import calibration_rows

            rows = calibration_rows(options.dynamic.calibration, texts, options.dynamic.tokens)
        model = load_model(base_here, config, options, hardware, rows)
    _remember(model, base_named, max_seq_length, options.rope_scaling)
    if fix_tokenizer:
        set_pad_token(texts, model)
    if full_finetuning and here.kind != "adapter":
        model.requires_grad_(True)
    if here.kind == "adapter":
        model = load_adapter(model, here)
    return model, tokenizer


def on_disk(source: Source, token: str | bool | None, trust_remote_code: bool) -> Source:
    """The source itself, or its local copy where it is on the hub."""
    return source if source.is_local else download(source, token=token, trust_remote_code=trust_remote_code)


def _remember(model: Any, source: Source, max_seq_length: int | None, rope_scaling: Any) -> None:
    """Leave on the model what adapters, exporters and the trainer ask it for."""
    # PEFT writes name_or_path into adapter_config.json: it has to be what `locate` finds the base by again.
    model.name_or_path = source.name
    model.config._name_or_path = source.name
    model.__dict__["pronghorn_source"] = source
    model.max_seq_length = _longest(model.config, max_seq_length, rope_scaling)


def _longest(config: Any, asked: int | None, rope_scaling: Any) -> int | None:
    """The longest row: as asked for, but within the table of a model that looks its positions up in one."""
    config = config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if not (limit and asked and asked > limit):
        return asked or limit
    if getattr(config, "rope_parameters", None) is None:
        logger.warning(
            "pronghorn: the model has a table of %d positions: max_seq_length is %d, not %d",
            limit,
            limit,
            asked,
        )
        return limit
    if not rope_scaling:
        logger.warning(
            "pronghorn: max_seq_length=%d is beyond the %d positions the model was trained on; "
            'give rope_scaling={"type": "linear", "factor": %.3g} to stretch them',
            asked,
            limit,
            asked / limit,
        )
    return asked
