"""A Transformers model from a local source, with everything that can be wrong about it said in one sentence."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pronghorn.engine import auto_class
from pronghorn.errors import (
    CheckpointCorrupt,
    PackageMissing,
    PronghornError,
    UnknownArgument,
    UnsupportedCheckpoint,
    WeightsMismatch,
)
from pronghorn.families import family_of
from pronghorn.hardware import Hardware
from pronghorn.importing import collector_paused
from pronghorn.loading.checkpoint import FP8, check_folder, weight_files
from pronghorn.loading.dynamic import check_can_be_quantised
from pronghorn.loading.experts import mixture_of, quantise_experts
from pronghorn.loading.fp8 import Fp8Options, quantise_layers
from pronghorn.loading.gguf_header import completed
from pronghorn.loading.int8 import Int8Options, quantise_to_int8
from pronghorn.loading.precision import quantisation
from pronghorn.loading.pretrained import from_pretrained, one_gpu
from pronghorn.loading.source import Source
from pronghorn.loading.towers import reads_images
from pronghorn.quantising.settings import DynamicQuantisation
from pronghorn.weights import keep_four_bit_layout

if TYPE_CHECKING:
    from pronghorn.quantising.calibration import CalibrationRows

logger = logging.getLogger("pronghorn")

#: weights of the decoder's layers; older checkpoints also hold their rotary frequencies
_OF_LAYERS = re.compile(r"(model\.)?(language_model\.)?layers\.\d+\.(?!.*inv_freq$)")


@dataclass(frozen=True)
class Options:
    """How a model is to be loaded; `bits` is 4, 8 or 16 (unquantised). `headless`: the decoder or encoder alone,
    without what predicts tokens."""

    dtype: torch.dtype
    bits: int
    bits_reason: str
    quant_type: str = "nf4"
    double_quant: bool = True
    device_map: Any = None
    rope_scaling: dict[str, Any] | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    fp8: Fp8Options | None = None
    int8: Int8Options | None = None
    headless: bool = False
    #: a model that reads images is to be loaded with the part that does, where Transformers has both; None: with either
    images: bool | None = False
    dynamic: DynamicQuantisation | None = None


def check_files(source: Source) -> list[Path]:
    """Check a local source's files without reading weights or importing Transformers; returns those that hold weights.

    Raises:
        CheckpointCorrupt, UnsupportedCheckpoint: as `check_folder`.
        PackageMissing: when the package that reads GGUF is not installed.
    """
    if source.gguf_file is None:
        check_folder(source.path)
        return weight_files(source.path)
    if find_spec("gguf") is None:
        raise PackageMissing(
            "the package gguf, which reads GGUF files, is not installed", fix="pip install gguf"
        )
    return [source.path / source.gguf_file]


def load_model(
    source: Source, config: Any, options: Options, hardware: Hardware, rows: CalibrationRows | None = None
) -> Any:
    """Load the model of a local folder or GGUF file on its device, unbound, in eval mode.

    Args:
        config: what `load_config` returned.
        rows: to measure on, for dynamic quantisation.

    Raises:
        CheckpointCorrupt: for missing weights, or weights of another shape than the config says.
        UnsupportedCheckpoint: for an architecture without a causal language model.
        QuantisationRefused: for what dynamic quantisation is not made for.
    """
    if options.rope_scaling:
        scale_rope(config.get_text_config(), options.rope_scaling)
    if options.dynamic is None:
        bits = _settle_bits(source, config, options)
    else:
        check_can_be_quantised(config, mixture_of(config))
        bits = 16  # it is read so, and quantised here
    extra: dict[str, Any] = {"quantization_config": _quantisation(source, config, options, bits)}
    dequantised = source.gguf_file is not None or _in_fp8(config)
    extra |= {"gguf_file": source.gguf_file} if source.gguf_file else {"use_safetensors": True}
    implementation = options.attn_implementation or _attention_that_caps(config)
    if implementation:
        extra["attn_implementation"] = implementation
    device_map = options.device_map or default_device_map(hardware, bits)
    stream_to = None
    replaced = options.int8 is not None or (options.fp8 is not None and options.fp8.both)
    with_experts = bits == 4 and mixture_of(config) is not None
    if (replaced and not _is_four_bit(config, bits)) or with_experts or options.dynamic is not None:
        device_map, stream_to = _by_way_of_cpu(device_map, bits)
    with collector_paused():  # this imports the model's code
        auto, arguments = _auto_class(config, options)
        auto._model_mapping.get(type(config), None)
    extra |= arguments
    try:
        model, info = from_pretrained(
            auto,
            source,
            config=config,
            dtype=options.dtype,
            device_map=device_map,
            trust_remote_code=options.trust_remote_code,
            **extra,
        )
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError) as error:
        raise _explained(error, source) from error
    _check_loaded(info, source, options.headless)
    if source.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        _to_compute_dtype(model, options.dtype)
    if dequantised:
        _forget_quantisation(model)
    if options.dynamic is not None:
        _quantise_dynamically(model, options, rows, device_map, stream_to)
    keep_four_bit_layout(model)
    if with_experts:
        quantise_experts(model, options.quant_type, options.double_quant, stream_to)
    if options.fp8 is not None:
        quantise_layers(model, options.fp8, stream_to)
    if options.int8 is not None:
        quantise_to_int8(model, options.int8, stream_to)
    return model


def _auto_class(config: Any, options: Options) -> tuple[Any, dict[str, Any]]:
    """Transformers' class that loads it, and arguments of the model's own class. BERT's pooler is left out: checkpoints
    of masked language models have none, and no pooling of ours reads it."""
    from transformers import AutoModel

    if not options.headless:
        return auto_class(config, images=options.images is not False), {}
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedCheckpoint(
            f"'{config.model_type}' models have an encoder and a decoder; one alone is taken here",
            fix="take an encoder of BERT's kind or a decoder",
        )
    own = AutoModel._model_mapping.get(type(config), None)
    pools = own is not None and "add_pooling_layer" in inspect.signature(own.__init__).parameters
    return AutoModel, {"add_pooling_layer": False} if pools else {}


def _to_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """What a quantised checkpoint holds unquantised, in the dtype asked for: Transformers leaves it in the file's, and
    layers that were kept out of the quantisation would then compute in another dtype than the rest."""
    stored = model.get_input_embeddings().weight.dtype
    for parameter in model.parameters():
        # Codes may be typed as floats (bnb_4bit_quant_storage); other dtypes than the embedding's are meant so.
        if parameter.dtype == stored != dtype and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _quantise_dynamically(
    model: Any,
    options: Options,
    rows: CalibrationRows | None,
    device_map: Any,
    stream_to: torch.device | None,
) -> None:
    """
    Raises:
        UnknownArgument: for a model that is spread over devices.
    """
    from pronghorn.quantising.dynamic import quantise

    if len(getattr(model, "hf_device_map", None) or {}) > 1:
        raise UnknownArgument(
            f"dynamic_4bit brings a model to one device, and device_map={device_map!r} spreads it",
            fix="leave out device_map; or write the model with pronghorn quantise first and load that",
        )
    assert options.dynamic is not None and rows is not None
    quantise(model, rows, options.dynamic, double=options.double_quant, device=stream_to)
    if stream_to is not None:
        model.hf_device_map = {"": stream_to}  # where accelerate looks


def _attention_that_caps(config: Any) -> str | None:
    """Transformers' eager attention for logits with a cap: some versions choose one that leaves the cap out, and answer
    with another model than the one that was trained."""
    family = family_of(config.model_type)
    return "eager" if family is not None and family.scales(config).attention_softcap is not None else None


def _is_four_bit(config: Any, bits: int) -> bool:
    stored = getattr(config, "quantization_config", None)
    return bits == 4 or bool(stored and stored.get("load_in_4bit"))


def _by_way_of_cpu(device_map: Any, bits: int) -> tuple[Any, torch.device | None]:
    """For a model that is to lie on one GPU: load it on the CPU, and the GPU to stream it to. Files are mapped into
    memory, so this costs the host little, and the GPU never holds the 16-bit model."""
    place = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    if (
        place is None
        or isinstance(place, dict)
        or place in ("auto", "balanced", "balanced_low_0", "sequential")
    ):
        return device_map, None
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return ({"": "cpu"} if bits == 4 else None), device


def _in_fp8(config: Any) -> bool:
    stored = getattr(config, "quantization_config", None)
    return stored is not None and stored.get("quant_method") == FP8


def _quantisation(source: Source, config: Any, options: Options, bits: int) -> Any:
    """bitsandbytes' config where weights are quantised on loading; for GGUF and fp8 dense ones, which can train."""
    if _in_fp8(config):
        from transformers import FineGrainedFP8Config

        return FineGrainedFP8Config(dequantize=True)
    if source.gguf_file is None:
        return quantisation(
            bits,
            options.dtype,
            quant_type=options.quant_type,
            double_quant=options.double_quant,
            images=reads_images(config),
        )
    from transformers import GgufConfig

    # Left to itself, Transformers keeps the blocks packed where it has a kernel, and such a model cannot be trained.
    return GgufConfig(dequantize=True)


def load_config(source: Source, trust_remote_code: bool) -> Any:
    """The Transformers config of a local source.

    Raises:
        UnsupportedCheckpoint: for an architecture that Transformers lacks.
        CheckpointCorrupt: for values that make no sense.
    """
    from transformers import AutoConfig

    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **extra)
        return config if source.gguf_file is None else completed(config, source.path / source.gguf_file)
    except PronghornError:
        raise
    except Exception as error:  # its classes differ by field and version; each is a damaged or unknown config
        raise _explained(error, source, "config.json") from error


def _explained(error: Exception, source: Source, file: str | None = None) -> Exception:
    """The error of ours that says what Transformers' exception means. Running out of memory stays what it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    text = " ".join(str(error).split())
    where = source.name if file is None or source.gguf_file else str(source.path / file)
    if "trust_remote_code" in text:
        return UnsupportedCheckpoint(
            "the model brings its own Python code, which is not run unless you allow it",
            where=where,
            fix="read the code; if you trust it, pass trust_remote_code=True",
        )
    if "ignore_mismatched_sizes" in text:
        return WeightsMismatch(
            "weights of the checkpoint have other shapes than config.json says",
            where=where,
            fix="use the config.json that belongs to these weights; after adding tokens, "
            "model.resize_token_embeddings(len(tokenizer)) before saving",
        )
    if any(
        part in text for part in ("does not recognize this architecture", "Unrecognized", "not supported")
    ):
        return UnsupportedCheckpoint(
            f"Transformers has no causal language model for it: {text[:300]}",
            where=where,
            fix="load a text model, or upgrade transformers where the model is newer than it; Fish-Speech's models are "
            "for `pronghorn speech`",
        )
    return CheckpointCorrupt(
        f"the model cannot be loaded: {type(error).__name__}: {text[:400]}",
        where=where,
        fix="download or save the model again",
    )


def scale_rope(config: Any, scaling: dict[str, Any]) -> None:
    """Put `rope_scaling={"type": "linear", "factor": 2.0}` into a config; the base frequency stays.

    Raises:
        UnknownArgument: for an unknown type, or a config with one RoPE per layer type.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    current = dict(getattr(config, "rope_parameters", None) or {})
    if any(isinstance(value, dict) for value in current.values()):
        raise UnknownArgument(
            "this model has a RoPE for each layer type, rope_scaling sets one", fix="leave out rope_scaling"
        )
    given = dict(scaling)
    kind = given.pop("rope_type", None) or given.pop("type", None)
    given.pop("type", None)
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise UnknownArgument(f"rope_scaling has the type '{kind}'", fix=f"use one of {', '.join(known)}")
    if kind != "default" and "factor" not in given:
        raise UnknownArgument(f"rope_scaling of type '{kind}' has no factor", fix="add 'factor': 2.0")
    kept = {name: current[name] for name in ("rope_theta", "partial_rotary_factor") if name in current}
    config.rope_parameters = {**kept, **given, "rope_type": kind}
    config.standardize_rope_params()


def _settle_bits(source: Source, config: Any, options: Options) -> int:
    """16 where the checkpoint itself settles it: GGUF and fp8 are dequantised, a bitsandbytes checkpoint stays as it
    is."""
    if source.gguf_file is not None:
        if options.bits != 16:
            logger.warning(
                "pronghorn: the GGUF file is dequantised to 16 or 32 bits; for %d-bit training save the model with "
                "pronghorn.export.save_merged once and load that folder",
                options.bits,
            )
        return 16
    stored = getattr(config, "quantization_config", None)
    if _in_fp8(config):
        more = ""
        if options.bits != 16:
            more = f"; for {options.bits}-bit training write it with pronghorn export --to merged_16bit first"
        logger.warning(
            "pronghorn: the checkpoint is stored in fp8 blocks and is dequantised to %s%s",
            options.dtype,
            more,
        )
        return 16
    if stored is None:
        logger.info(
            "pronghorn: weights are loaded %s (%s)",
            f"in {options.bits} bits" if options.bits != 16 else "unquantised",
            options.bits_reason,
        )
        return options.bits
    if find_spec("bitsandbytes") is None:
        raise PackageMissing(
            "the checkpoint is quantised by bitsandbytes, which is not installed",
            where=source.name,
            fix="pip install bitsandbytes, or load the original 16-bit checkpoint",
        )
    stored_bits = 4 if stored.get("load_in_4bit") else 8
    if options.bits != stored_bits and options.bits_reason == "asked for":
        instead = "" if options.bits == 16 else f"; the arguments ask for {options.bits}"
        logger.warning(
            "pronghorn: the checkpoint is stored in %d bits and is loaded so%s", stored_bits, instead
        )
    if stored_bits == 4:  # the machine, not the one that made the checkpoint, decides what it computes in
        stored["bnb_4bit_compute_dtype"] = str(options.dtype).removeprefix("torch.")
    return 16


def gpu_in_sight(device_map: Any, hardware: Hardware) -> torch.device | None:
    """The one GPU that a model will lie on, where that can be said before anything is loaded; else None."""
    if not hardware.is_cuda or (
        torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    ):
        return None
    return one_gpu(device_map or {"": torch.cuda.current_device()})


def default_device_map(hardware: Hardware, bits: int) -> Any:
    """All on this process's GPU; on a CPU nothing needs saying, except to bitsandbytes."""
    if not hardware.is_cuda:
        return {"": "cpu"} if bits != 16 else None
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        from accelerate import PartialState

        return {"": PartialState().local_process_index}
    return {"": torch.cuda.current_device()}


def _check_loaded(info: dict[str, Any], source: Source, headless: bool = False) -> None:
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        head = "lm_head.weight" in missing
        raise WeightsMismatch(
            f"{len(missing)} weights are not in the checkpoint and would be random, first {missing[0]}",
            where=source.name,
            fix="set tie_word_embeddings to true in config.json if this model shares the head with the embedding; else "
            "download or save it again"
            if head and len(missing) == 1
            else "use the config.json that belongs to these weights, or download or save the model again",
        )
    mismatched = sorted(
        str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys") or []
    )
    if mismatched:
        raise WeightsMismatch(
            f"{len(mismatched)} weights have another shape than config.json says, first {mismatched[0]}",
            where=source.name,
            fix="use the config.json that belongs to these weights",
        )
    unexpected = sorted(info.get("unexpected_keys") or [])
    of_layers = [name for name in unexpected if _OF_LAYERS.match(name)]
    if of_layers:
        raise WeightsMismatch(
            f"{len(of_layers)} weights of the checkpoint's layers have no place in the model that config.json "
            f"describes, first {of_layers[0]}",
            where=source.name,
            fix="use the config.json that belongs to these weights",
        )
    if unexpected and not headless:  # heads and poolers have none by intention
        logger.warning(
            "pronghorn: %d weights of the checkpoint have no place in the model, first %s",
            len(unexpected),
            unexpected[0],
        )


def _forget_quantisation(model: Any) -> None:
    """The weights are plain now: without this, Transformers would refuse to save the model and Trainer to train it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
