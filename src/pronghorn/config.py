"""A training run described in YAML: frozen dataclasses, read strictly and without importing torch.

An unknown key, a value of the wrong type or outside its choices is refused with the file, the line and, where one is
close, the key that was probably meant. The names are those of the Python interface: ``model`` holds the arguments of
`FastLanguageModel.from_pretrained`, ``adapter`` those of `FastLanguageModel.get_peft_model` (and any other field of
PEFT's LoraConfig), ``training`` those of `SFTConfig` (any other field of TRL's SFTConfig or Transformers'
TrainingArguments). The other fields are checked when a run starts, since checking them loads those libraries.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pronghorn.errors import ALSO_CALLED, ConfigInvalid, nearest

SaveLevel = Literal[
    "auto",
    "offload",
    "none",
    "offload-attention",
    "attention",
    "offload-matmuls",
    "matmuls",
    "all",
    "unsloth",
]


@dataclass(frozen=True)
class ModelSection:
    """Which model, and how it is loaded (`FastLanguageModel.from_pretrained`)."""

    name: str = field(metadata={"argument": "model_name"})
    max_seq_length: int | None = field(default=None, metadata={"at_least": 1})
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    load_in_4bit: bool | None = None
    """Left out: 4 bits on a CUDA GPU with bitsandbytes, unquantised elsewhere and for GGUF files."""
    load_in_8bit: bool = False
    load_in_fp8: bool | Literal["mixed", "backward"] | None = None
    fp8_skip_layers: int | None = field(default=None, metadata={"at_least": 0})
    fp8_modules: list[str] | None = None
    fp8_copies: int | None = field(default=None, metadata={"at_least": 1})
    load_in_int8: bool | None = None
    int8_skip_layers: int | None = field(default=None, metadata={"at_least": 0})
    int8_modules: list[str] | None = None
    int8_copies: int | None = field(default=None, metadata={"at_least": 1})
    dynamic_4bit: bool | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_use_double_quant: bool | None = None
    full_finetuning: bool = False
    gguf_file: str | None = None
    fix_tokenizer: bool | None = None
    revision: str | None = None
    trust_remote_code: bool | None = None
    device_map: str | dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    attn_implementation: str | None = None
    attention: str | None = None
    use_gradient_checkpointing: bool | SaveLevel | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class AdapterSection:
    """Which adapter is trained (`FastLanguageModel.get_peft_model`). Not used with ``model.full_finetuning``."""

    r: int | None = field(default=None, metadata={"at_least": 1})
    target_modules: list[str] | str | None = None
    lora_alpha: int | float | None = None
    lora_dropout: float | None = field(default=None, metadata={"at_least": 0, "below": 1})
    bias: Literal["none", "all", "lora_only"] | None = None
    use_gradient_checkpointing: bool | SaveLevel | None = None
    random_state: int | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str | None = None
    other: dict[str, Any] = field(default_factory=dict, metadata={"catches_unknown": True})
    """Further fields of PEFT's LoraConfig, as written; `section_arguments` checks them."""


@dataclass(frozen=True)
class DataSection:
    """Which rows, and which part of them is trained on."""

    dataset: str | list[str]
    """``docstrings`` (Python's own library), .json, .jsonl, .csv or .parquet files, a folder, or a hub id."""
    subset: str | None = None
    split: str = "train"
    held_back: int = field(default=0, metadata={"at_least": 0})
    """Rows set aside for evaluation, chosen with ``training.seed``."""
    eval_dataset: str | list[str] | None = None
    eval_split: str | None = None
    """Rows to evaluate on instead: of other files, or of another split of them or of ``dataset``."""
    limit: int | None = field(default=None, metadata={"at_least": 1})
    text_field: str | None = None
    """Column of plain text; without it chat (``messages``), prompt/completion and Alpaca rows are recognised."""
    responses_only: bool = True
    """Train on the assistant's answers only (chat, prompt/completion and Alpaca rows)."""

    @property
    def evaluates(self) -> bool:
        """Whether there are rows that are evaluated on."""
        return bool(self.held_back or self.eval_split) or self.eval_dataset is not None


@dataclass(frozen=True)
class TrainingSection:
    """How it is trained (`SFTConfig`). None leaves the default of SFTConfig."""

    max_steps: int | None = field(default=None, metadata={"at_least": -1})
    num_train_epochs: float | None = field(default=None, metadata={"at_least": 0})
    per_device_train_batch_size: int | None = field(default=None, metadata={"at_least": 1})
    per_device_eval_batch_size: int | None = field(default=None, metadata={"at_least": 1})
    gradient_accumulation_steps: int | None = field(default=None, metadata={"at_least": 1})
    learning_rate: float | None = field(default=None, metadata={"at_least": 0})
    lr_scheduler_type: str | None = None
    warmup_steps: int | float | None = field(default=None, metadata={"at_least": 0})
    weight_decay: float | None = field(default=None, metadata={"at_least": 0})
    max_grad_norm: float | None = field(default=None, metadata={"at_least": 0})
    optim: str | None = None
    max_length: int | Literal["auto"] | None = field(default=None, metadata={"at_least": 1})
    packing: bool | None = None
    memory_budget: str | int | None = None
    cuda_graphs: bool | None = None
    gradient_checkpointing: bool | None = None
    logging_steps: int | float | None = field(default=None, metadata={"at_least": 0})
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: int | float | None = field(default=None, metadata={"at_least": 0})
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = None
    save_steps: int | float | None = field(default=None, metadata={"at_least": 0})
    save_total_limit: int | None = field(default=None, metadata={"at_least": 0})
    report_to: str | list[str] | None = None
    seed: int = field(default=3407, metadata={"at_least": 0, "below": 2**32})
    other: dict[str, Any] = field(default_factory=dict, metadata={"catches_unknown": True})
    """Further fields of SFTConfig, as written; `section_arguments` checks them."""


@dataclass(frozen=True)
class OutputSection:
    """What is left when the run ends."""

    folder: str = "outputs"
    save_adapter: bool = True
    save_merged: Literal["merged_16bit", "merged_4bit", "fp8"] | None = None


@dataclass(frozen=True)
class RunConfig:
    """One training run. ``source`` and ``lines`` (dotted key to line) are for messages."""

    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    output: OutputSection = OutputSection()
    source: str = field(default="", metadata={"hidden": True}, compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, metadata={"hidden": True}, compare=False)

    def where(self, key: str) -> str:
        """``config.yaml, line 7`` for a dotted key."""
        return _where(self.source, self.lines, key)


#: What only rows are written in; .json may be a configuration, too, since YAML reads it.
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check ``path``; ``overrides`` are ``section.key=value`` with the value in YAML.

    Raises:
        ConfigInvalid: no such file, no YAML, or a key or value that a run does not know.
    """
    path = Path(path)
    if path.suffix.lower() in _ROWS and path.is_file():
        raise ConfigInvalid(
            "this is a file of rows, and a configuration is wanted",
            where=str(path),
            fix=f"write a .yaml file that names it under data: dataset: {path}",
        )
    if path.is_dir():
        raise ConfigInvalid(
            "this is a folder, and a .yaml file is wanted", where=str(path), fix="name the file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigInvalid("there is no such file", where=str(path), fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"the file cannot be read: {error}",
            where=str(path),
            fix="check its permissions and its encoding (UTF-8)",
        ) from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str, source: str = "config", overrides: Iterable[str] = ()) -> RunConfig:
    """`load_config` for a string; ``source`` names it in messages."""
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = {} if node is None else _plain(node, "", lines, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = str(error.problem or error.context)
        raise ConfigInvalid(f"this is not YAML: {problem}", where=place, fix="correct that line") from None
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"this is not YAML: {error}", where=source) from None
    if not isinstance(values, dict):
        raise ConfigInvalid(
            f"a configuration has sections with keys, and this is {_shown(values)}",
            where=source,
            fix=_SECTIONS,
        )
    for override in overrides:
        _override(values, lines, override)
    sections = _section(RunConfig, values, "", source, lines)
    config = dataclasses.replace(sections, source=source, lines=lines)
    _check_together(config)
    return config


def arguments(section: object) -> dict[str, Any]:
    """The section's set values under the names of the Python interface; None values are left to its defaults."""
    named = {}
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        if value is not None and "catches_unknown" not in item.metadata:
            named[item.metadata.get("argument", item.name)] = value
    return named


def section_arguments(config: RunConfig, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of section ``name``, with the further keys it caught; ``known`` are their types by name.

    Raises:
        ConfigInvalid: a key that is neither one of the section's own nor in ``known``, or a value of the wrong type.
    """
    section = getattr(config, name)
    others = {}
    for key, value in section.other.items():
        where = config.where(f"{name}.{key}")
        if key not in known:
            candidates = known.keys() | {item.name for item in dataclasses.fields(section)} - {"other"}
            raise _unknown(key, name, candidates, where)
        others[key] = _checked(value, known[key], f"{name}.{key}", {}, where)
    return {**arguments(section), **others}


_SECTIONS = "the sections are model, adapter, data, training, output"


def _plain(node: yaml.Node, key: str, lines: dict[str, int], source: str) -> Any:
    """YAML node to plain values; remembers each dotted key's line and refuses a key given twice."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, key, lines, source) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_object(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = str(getattr(key_node, "value", key_node))
        dotted = f"{key}.{name}" if key else name
        line = key_node.start_mark.line + 1
        if name in values:
            raise ConfigInvalid(
                f"the key '{dotted}' is given twice, first in line {lines[dotted]}",
                where=f"{source}, line {line}",
                fix="keep one of them",
            )
        lines[dotted] = line
        values[name] = _plain(value_node, dotted, lines, source)
    return values


def _override(values: dict[str, Any], lines: dict[str, int], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise ConfigInvalid(
            f"'{override}' is not of the form section.key=value",
            where="--set",
            fix="write it like --set training.max_steps=10",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigInvalid(f"'{text}' is not a YAML value", where=f"--set {key}") from None
    target = values.setdefault(section, {})
    if target is None:
        target = values[section] = {}
    if isinstance(target, dict):
        target[name] = value
        lines[key.strip()] = 0  # shown as --set


def _where(source: str, lines: Mapping[str, int], key: str) -> str:
    line = lines.get(key)
    if line == 0:
        return f"--set {key}"
    return f"{source}, line {line}" if line else source


def _unknown(key: str, section: str, known: Iterable[str], where: str) -> ConfigInvalid:
    known = sorted(known)
    place = f"under '{section}'" if section else "at the top level"
    fix = "" if section else _belongs(key)
    fix = (
        fix or nearest(key, known) or (f"known here: {', '.join(known)}" if len(known) < 20 else "remove it")
    )
    return ConfigInvalid(f"unknown key '{key}' {place}", where=where, fix=fix)


def _belongs(key: str) -> str:
    """Where a key of a section belongs that was written outside of all; "" for one of none."""
    name = ALSO_CALLED.get(key.lower(), key)
    for section, kind in get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind) and name in {item.name for item in dataclasses.fields(kind)}:
            return f"write it under '{section}', as {name}"
    return ""


def _section(kind: type, values: Any, name: str, source: str, lines: Mapping[str, int]) -> Any:
    """Build dataclass ``kind`` from a mapping, checking every key and value."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigInvalid(
            f"'{name}' must be a section with keys, not {_shown(values)}",
            where=_where(source, lines, name),
            fix="indent its keys under it",
        )
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind) if "hidden" not in item.metadata}
    catcher = next((item for item in fields.values() if "catches_unknown" in item.metadata), None)
    settable = {key for key in fields if fields[key] is not catcher}
    arguments: dict[str, Any] = {}
    caught: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{name}.{key}" if name else key
        where = _where(source, lines, dotted)
        if key not in settable:
            if catcher is None:
                raise _unknown(key, name, settable, where)
            caught[key] = value
        elif dataclasses.is_dataclass(hints[key]):
            arguments[key] = _section(hints[key], value, dotted, source, lines)
        else:
            arguments[key] = _checked(value, hints[key], dotted, fields[key].metadata, where)
    for key in settable - arguments.keys():
        item = fields[key]
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            missing = f"{name}.{key}" if name else key
            raise ConfigInvalid(
                f"'{missing}' is missing",
                where=_where(source, lines, name),
                fix=_EXAMPLES.get(missing, "add it"),
            )
    if catcher is not None:
        arguments[catcher.name] = caught
    return kind(**arguments)


_EXAMPLES = {
    "model": "add a section 'model' with the key 'name'",
    "model.name": "add the hub id, folder or .gguf file of a model",
    "data": "add a section 'data' with the key 'dataset'",
    "data.dataset": "add a file, a folder, a hub id, or 'docstrings'",
}


def _checked(value: Any, hint: Any, key: str, rules: Mapping[str, Any], where: str) -> Any:
    """``value`` as the annotated type, or the reason why it is none."""
    # YAML 1.1 reads 2e-4 (no dot) as text; whoever writes it means the number.
    if (
        isinstance(value, str)
        and _accepts(0.5, hint)
        and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    ):
        value = float(value)
    # It also reads no as false, unlike the choice of that name.
    if value is False and not _accepts(value, hint) and "no" in _choices(hint):
        value = "no"
    if not _accepts(value, hint):
        fix = f"give {_described(hint)}"
        if isinstance(value, str) and (close := nearest(value, _choices(hint))):
            fix = close
        raise ConfigInvalid(f"'{key}' cannot be {_shown(value)}", where=where, fix=fix)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value:
            raise ConfigInvalid(f"'{key}' cannot be {value}", where=where, fix="give a number")
        if value < rules.get("at_least", value):
            raise ConfigInvalid(
                f"'{key}' cannot be {value}", where=where, fix=f"at least {rules['at_least']}"
            )
        if "below" in rules and value >= rules["below"]:
            raise ConfigInvalid(f"'{key}' cannot be {value}", where=where, fix=f"less than {rules['below']}")
    return value


def _accepts(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_accepts(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_accepts(item, get_args(hint)[0]) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if not isinstance(hint, type):  # Any, or a shape that its owner checks
        return True
    if issubclass(hint, Enum):
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for option in get_args(hint) for choice in _choices(option)]


def _described(hint: Any) -> str:
    """A type in words: ``one of none, all, or true or false``."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = list(dict.fromkeys(_described(o) for o in get_args(hint) if o is not type(None)))
        return " or ".join(options)
    if origin is Literal:
        return "one of " + ", ".join(get_args(hint))
    if origin is list:
        return f"a list ({_described(get_args(hint)[0])} each)"
    if origin is dict:
        return "a section with keys"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section"}
    return names.get(hint, "text")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return "empty" if value is None else repr(value)


def _check_together(config: RunConfig) -> None:
    """Choices that exclude each other."""
    model = config.model
    if model.load_in_4bit and model.load_in_8bit:
        raise ConfigInvalid(
            "'model.load_in_4bit' and 'model.load_in_8bit' exclude each other",
            where=config.where("model.load_in_8bit"),
            fix="keep one of them",
        )
    if model.full_finetuning and (model.load_in_4bit or model.load_in_8bit):
        raise ConfigInvalid(
            "'model.full_finetuning' trains every weight, which quantised weights do not allow",
            where=config.where("model.full_finetuning"),
            fix="leave out load_in_4bit and load_in_8bit, or train an adapter",
        )
    if config.training.eval_strategy not in (None, "no") and not config.data.evaluates:
        raise ConfigInvalid(
            "'training.eval_strategy' needs rows to evaluate on",
            where=config.where("training.eval_strategy"),
            fix="set data.held_back to how many rows are held back, or data.eval_dataset to a file of them",
        )
    if config.data.held_back and (config.data.eval_dataset or config.data.eval_split):
        key = "eval_dataset" if config.data.eval_dataset else "eval_split"
        raise ConfigInvalid(
            f"'data.held_back' and 'data.{key}' both say which rows are evaluated on",
            where=config.where(f"data.{key}"),
            fix="keep one of them",
        )
    if model.full_finetuning and config.adapter != AdapterSection():
        raise ConfigInvalid(
            "'adapter' has no place beside 'model.full_finetuning: true'",
            where=config.where("adapter"),
            fix="remove one of the two",
        )
