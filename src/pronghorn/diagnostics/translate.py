"""Other libraries' exceptions as this library's errors: what happened in one sentence, and what helps.

`translate` is for an exception at hand, `translate_text` for an error that somebody pasted.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pronghorn import errors
from pronghorn.diagnostics.explanations import EXPLANATIONS
from pronghorn.errors import PronghornError


@dataclass(frozen=True)
class Rule:
    """Texts that mean one error.

    Args:
        pattern: searched in ``TypeName: text``, without regard to case and across lines.
        message: what happened; {0}, {1} are the pattern's groups. None: the exception's own first line.
        fix: where the catalogue's general advice can be narrowed.
    """

    kind: type[PronghornError]
    pattern: str
    message: str | None = None
    fix: str | None = None


#: The first that matches counts, so what is special stands before what is general.
RULES: tuple[Rule, ...] = (
    # --- memory
    Rule(errors.OutOfMemory, r"can't allocate memory|not enough memory: you tried to allocate|Cannot allocate memory",
         "the host's memory did not suffice",
         "end other programs, set dataloader_num_workers=0, or load with load_in_4bit; `pronghorn doctor` shows what "
         "is free"),
    Rule(errors.OutOfMemory, r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|hipErrorOutOfMemory"
         r"|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"),
    # --- GPU, driver, versions
    Rule(errors.UnsupportedGpu, r"no kernel image is available|invalid device function"
         r"|is not compatible with the current PyTorch installation|fp8e4nv not supported in this architecture"
         r"|supports? only (?:GPUs|devices) (?:with|of) CUDA [Cc]apability",
         "the installed libraries have no code for this GPU"),
    Rule(errors.VersionMismatch, r"invalid configuration argument",
         "a kernel was launched with settings the driver refuses (invalid configuration argument): versions do not go "
         "together"),
    Rule(errors.VersionMismatch, r"undefined symbol:? ?(\S+)",
         "a compiled package was made for another version of torch or CUDA (undefined symbol {0})"),
    Rule(errors.VersionMismatch, r"driver version is insufficient|NVIDIA driver on your system is too old",
         "the NVIDIA driver is older than the CUDA that torch was built with",
         "update the driver, or install a torch for the driver's CUDA; `pronghorn doctor --fix-hints` names both"),
    Rule(errors.VersionMismatch, r"PTX was compiled with an unsupported toolchain|forward compatibility was attempted"
         r"|Driver/library version mismatch",
         "driver and CUDA libraries are of different versions",
         "update the driver; after an update restart the machine"),
    Rule(errors.VersionMismatch, r"(lib(?:cud|cublas|nvrtc|nccl|nvJitLink)\S*): cannot open shared object"
         r"|GLIBCXX_\S+' not found",
         "a compiled package does not find a library it needs ({0})"),
    Rule(errors.VersionMismatch, r"Torch not compiled with CUDA enabled|Found no NVIDIA driver"
         r"|No CUDA GPUs are available|no CUDA-capable device is detected",
         "torch can use no GPU here",
         "`pronghorn doctor` says whether torch is a CPU build, the driver is missing, or CUDA_VISIBLE_DEVICES hides "
         "it"),
    Rule(errors.VersionMismatch,
         r"cannot import name '(\w+)' from '((?:torch|triton|transformers|trl|peft|accelerate)\S*)'"
         r"|module '((?:torch|triton|transformers|trl|peft)\S*)' has no attribute",
         "installed packages are of versions that do not know each other"),
    # --- token ids, before faults in general
    Rule(errors.TokenOutOfVocabulary, r"device-side assert triggered|srcIndex < srcSelectDimSize|t < n_classes",
         "a GPU kernel met an index that does not exist, most often a token id or a label (device-side assert)"),
    Rule(errors.TokenOutOfVocabulary, r"IndexError: index out of range in self|^index out of range in self",
         "a token id is beyond the model's embedding"),
    Rule(errors.TokenOutOfVocabulary, r"Target (-?\d+) is out of bounds", "the label {0} is no token of the model"),
    Rule(errors.GpuFault, r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction"
         r"|uncorrectable ECC|fallen off the bus|launch timed out|CUDA error: unknown error"
         r"|CUBLAS_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR)"),
    # --- dtypes and devices
    Rule(errors.DtypesMixed, r"Attempting to unscale FP16 gradients",
         "float16 weights are trained with fp16=True, which scales gradients of float32 weights",
         "load with dtype='float32' for fp16=True, or train in bfloat16"),
    Rule(errors.DtypesMixed, r"not implemented for '(Half)'",
         "this operation does not exist in float16 on this device", "use dtype='bfloat16' or 'float32' here"),
    Rule(errors.DtypesMixed, r"(?:m1 and m2|mat1 and mat2|mat1 and mat2|self and mat2) (?:to|must) have the same dtype"
         r"(?:, but got: ?([\w:]+) (?:!=|and) ([\w:]+))?|expected scalar type (\w+) but found (\w+)"
         r"|Input type \(?([\w.]+)\)? and (?:bias|weight) type \(?([\w.]+)\)? should be the same"
         r"|expected (?:m1 and m2|query, key, and value) to have the same dtype",
         "tensors of two dtypes met in one product"),
    Rule(errors.DevicesMixed, r"loaded with `?device_map='auto'`? in any distributed mode",
         "a model spread by device_map='auto' cannot be trained by several processes"),
    Rule(errors.DevicesMixed, r"Expected all tensors to be on the same device(?:.*?devices?, (\S+) and (\S+?)[!.\s])?"
         r"|found at least two devices|must have its parameters and buffers on device"
         r"|a model that has been loaded .{0,60} on a different device",
         "tensors of two devices met in one operation"),
    # --- several processes
    Rule(errors.ProcessesFailed, r"NCCL error|DistBackendError|Watchdog caught collective operation timeout"
         r"|ChildFailedError|finished reduction in the prior iteration|Connection closed by peer"
         r"|EADDRINUSE|DistNetworkError|DistStoreError"),
    # --- resuming and weights
    Rule(errors.ResumeMismatch, r"loaded state dict (?:contains a parameter group|has a different number of parameter)",
         "the checkpoint's optimizer was made for other weights than are trained now"),
    Rule(errors.ResumeMismatch, r"size mismatch for (\S*(?:lora_|adapter)\S*):",
         "the checkpoint's adapter has another shape at {0}"),
    Rule(errors.WeightsMismatch,
         r"size mismatch for (\S+?): copying a param with shape (?:torch\.Size\()?(\[[\d, ]*\])\)? "
         r"from checkpoint, the shape in current model is (?:torch\.Size\()?(\[[\d, ]*\])",
         "{0} is {1} in the checkpoint and {2} in the model"),
    Rule(errors.WeightsMismatch, r"size mismatch for (\S+)", "{0} has another shape in the checkpoint"),
    Rule(errors.WeightsMismatch, r"ignore_mismatched_sizes",
         "weights of the checkpoint have other shapes than the model"),
    Rule(errors.WeightsMismatch, r"""(?:Missing key\(s\) in state_dict|KeyError): ['"]?([\w.]*(?:weight|bias)[\w.]*)""",
         "{0} is missing from the checkpoint"),
    Rule(errors.WeightsMismatch, r"newly initialized:? \[?'?(lm_head\.weight)", "{0} is missing from the checkpoint"),
    Rule(errors.CheckpointCorrupt, r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|PytorchStreamReader failed"
         r"|UnpicklingError|invalid load key"),
    # --- the hub
    Rule(errors.GatedModel, r"GatedRepoError|gated repo|access to model \S+ is restricted|403 Client Error",
         "the hub asks for an accepted licence and a login before it gives this model"),
    Rule(errors.HubUnreachable, r"OfflineModeIsEnabled|LocalEntryNotFoundError|couldn't connect to 'https?://"
         r"|Max retries exceeded|name resolution|Name or service not known|ConnectTimeout|ReadTimeout|ProxyError"
         r"|CERTIFICATE_VERIFY_FAILED|certificate verify failed|Network is unreachable",
         "the hub cannot be reached"),
    Rule(errors.TokenizerProblem, r"chat_template is not set|does not have a chat template",
         "the tokenizer has no chat template",
         "get_chat_template(tokenizer, 'chatml'), or train on plain text (a column 'text')"),
    Rule(errors.TokenizerProblem, r"does not have a padding token",
         "the tokenizer has no padding token", "tokenizer.pad_token = tokenizer.eos_token, or load it with "
         "FastLanguageModel, which chooses one"),
    Rule(errors.TokenizerProblem, r"Can't load tokenizer for '?([^'\s]*)|Couldn't instantiate the backend tokenizer",
         "there is no tokenizer beside the model"),
    Rule(errors.UnsupportedCheckpoint, r"trust_remote_code|execute the (?:configuration|modeling) file",
         "the model needs code of its own repository",
         "read that code first; trust_remote_code=True then runs it"),
    Rule(errors.UnsupportedCheckpoint, r"has model type `?(\w+)`? but Transformers does not recognize"
         r"|Unrecognized model in",
         "Transformers does not know this type of model ({0})", "pip install -U transformers, or check config.json"),
    Rule(errors.ModelNotFound, r"RepositoryNotFoundError|EntryNotFoundError|RevisionNotFoundError|401 Client Error"
         r"|is not a valid model identifier|does not appear to have a file named config\.json|HFValidationError",
         "neither a local folder nor the hub has this model"),
    # --- data
    Rule(errors.ChatTemplateMismatch, r"roles must alternate|System role not supported"
         r"|Only user.{0,30}roles are supported|TemplateError|TemplateSyntaxError|UndefinedError",
         "the chat template refuses a conversation",
         "bring the roles into the order it expects (`pronghorn data check FILE` lists the rows), or choose the "
         "model's own template"),
    # --- files and packages
    Rule(errors.SaveFailed, r"No space left on device|Disk quota exceeded|Read-only file system|os error 28"),
    Rule(errors.PackageMissing, r"ModuleNotFoundError: No module named '([\w.]+)'",
         "the package {0} is not installed", "pip install {0}, in the environment of this Python"),
    Rule(errors.PackageMissing, r"requires? the (?:following packages?|\w+ library)"
         r"|ImportError: Using .{0,60}requires"),
    # --- numbers
    Rule(errors.NonFiniteLoss, r"probability tensor contains either `?inf`?",
         "the model's predictions are no numbers, so nothing can be sampled"),
)  # fmt: skip


def translate(error: BaseException) -> PronghornError | None:
    """The error that an exception means, or None for one that is not known. Causes are looked at, too.

    An error of this library is given back as it is.
    """
    for link in _chain(error):
        if isinstance(link, PronghornError):
            return link
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return _made(
                Rule(errors.SaveFailed, ""), _first_line(str(link)), None, where=str(link.filename or "")
            )
        found = _by_text(f"{type(link).__name__}: {link}")
        if found is not None:
            return found
    return None


def translate_text(text: str) -> PronghornError | None:
    """The error that a pasted text means, or None. A code in it decides; else the line where an exception stands."""
    code = re.search(r"\bPH(\d{3})\b", text)
    if code is not None and f"PH{code[1]}" in EXPLANATIONS:
        kind = next(item for item in _kinds() if item.code == f"PH{code[1]}")
        return kind(text.strip())
    return _by_text(text)


def advice(kind: type[PronghornError]) -> str:
    """The catalogue's fix of an error."""
    explanation = EXPLANATIONS.get(kind.code)
    return "" if explanation is None else explanation.fix


def _kinds() -> Iterator[type[PronghornError]]:
    for item in vars(errors).values():
        if isinstance(item, type) and issubclass(item, PronghornError):
            yield item


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from or while handling; each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _by_text(text: str) -> PronghornError | None:
    for rule in RULES:
        matched = re.search(rule.pattern, text, re.IGNORECASE | re.DOTALL | re.MULTILINE)
        if matched is not None:
            line = text[matched.start() :] if "\n" in text else text
            return _made(rule, _first_line(line), matched)
    return None


def _made(rule: Rule, line: str, matched: re.Match[str] | None, where: str = "") -> PronghornError:
    groups = [group or "" for group in matched.groups()] if matched is not None else []
    message = line if rule.message is None else _filled(rule.message, groups)
    fix = advice(rule.kind) if rule.fix is None else _filled(rule.fix, groups)
    if rule.kind is errors.OutOfMemory and rule.message is None:
        message = out_of_memory_message(matched.string if matched is not None else line)
    return rule.kind(message, fix=fix.rstrip("."), where=where)


def _filled(template: str, groups: list[str]) -> str:
    filled = template.format(*groups, *[""] * 4)
    return filled.replace(" ()", "")


def out_of_memory_message(text: str) -> str:
    """What was asked for, what was free, and who held the rest, from the text of torch's error."""
    size = r"([\d.]+ [KMGT]iB)"
    asked = re.search(rf"[Tt]ried to allocate {size}", text)
    card = re.search(rf"GPU (\d+) has a total capacity of {size} of which {size} is free", text)
    held = re.search(rf"this process has {size} memory in use", text)
    others = re.findall(rf"Process \d+ has {size} memory in use", text)
    said = "the GPU's memory did not suffice"
    if asked:
        said += f": {asked[1]} more were needed"
    if card:
        said += f"{',' if asked else ':'} {card[3]} of GPU {card[1]}'s {card[2]} were free"
    if held:
        said += f"; this process held {held[1]}"
    if others:
        said += f", other processes {' + '.join(others)}"
    return said


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if lines else text.strip()).rstrip(". ")[:300]
