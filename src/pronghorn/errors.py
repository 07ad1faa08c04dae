"""Errors a user can cause, each with a stable code, what happened, where, and how to fix it.

`PronghornError.__str__` is one sentence for a terminal: ``[PH201] message (where). Fix: ...``. Commands print it
without a traceback and exit with status 2. `docs/errors.md` is generated from the subclasses of this module.

Codes: PH1xx checkpoints and models, PH2xx adapters and the engine, PH3xx data, PH4xx configuration and commands,
PH5xx hardware and memory, PH6xx saving and export, PH7xx training runs, PH8xx answering.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class PronghornError(Exception):
    """Base of all user-facing errors.

    Args:
        message: what happened, one sentence without a trailing full stop.
        fix: the smallest change that helps.
        where: file, line, module or row that the message is about.
    """

    code = "PH000"

    def __init__(self, message: str, *, fix: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message, self.fix, self.where = message, fix, where

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"[{self.code}] {self.message}{where}.{fix}"


#: What settings are called elsewhere, too far from their names here to be found by their letters.
ALSO_CALLED = {
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "alpha": "lora_alpha",
    "batch_size": "per_device_train_batch_size",
    "dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "eval_data": "eval_dataset",
    "eval_file": "eval_dataset",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "lr": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "model_id": "name",
    "model_name_or_path": "name",
    "model_path": "name",
    "num_epochs": "num_train_epochs",
    "rank": "r",
    "scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "test_dataset": "eval_dataset",
    "tune": "search",
    "val_dataset": "eval_dataset",
    "val_set_size": "held_back",
    "validation_dataset": "eval_dataset",
    "warmup": "warmup_steps",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" clause for an unknown name, or an empty string when nothing is close."""
    known = list(known)
    meant = ALSO_CALLED.get(name.lower())
    close = [meant] if meant in known else get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


class ModelNotFound(PronghornError):
    """A model folder, hub id or file could not be found."""

    code = "PH101"


class CheckpointCorrupt(PronghornError):
    """A checkpoint exists but cannot be read: truncated, wrong format, missing shards or keys."""

    code = "PH102"


class UnsupportedCheckpoint(PronghornError):
    """A checkpoint is readable but refused: pickle weights, remote code, an unknown quantisation."""

    code = "PH103"


class TokenizerProblem(PronghornError):
    """The tokenizer is missing, or lacks what the work needs (a chat template, an EOS token)."""

    code = "PH104"


class TargetModuleNotFound(PronghornError):
    """`target_modules` or `modules_to_save` names something the model does not have."""

    code = "PH201"


class BindingRefused(PronghornError):
    """`strict=True` and part of the model cannot take the fast path."""

    code = "PH202"


class BackwardTwice(PronghornError):
    """A second backward through one forward; the saved activations were consumed by the first."""

    code = "PH203"


class UnknownSaveLevel(PronghornError):
    """A save level that does not exist, or a list of levels of the wrong length."""

    code = "PH204"


class ConfigInvalid(PronghornError):
    """A configuration file has an unknown key, a value of the wrong type or outside its choices, or is no YAML."""

    code = "PH401"


class CommandMisused(PronghornError):
    """A command was given arguments that do not go together, or a file or folder it cannot use."""

    code = "PH402"


class PackageMissing(PronghornError):
    """Something this work needs is not installed on this machine."""

    code = "PH403"


class RowsUnreadable(PronghornError):
    """Training rows exist but cannot be read: no JSON, columns of mixed types, or none at all."""

    code = "PH310"


class UnknownArgument(PronghornError):
    """A function was given an argument it does not have, or a value outside the argument's choices."""

    code = "PH404"


class AdapterProblem(PronghornError):
    """An adapter cannot be put on this model: it has one already, or the combination has no meaning."""

    code = "PH205"


class SaveFailed(PronghornError):
    """Writing a model failed: the disk is full, the folder cannot be written, or a weight cannot be merged."""

    code = "PH601"


class ExportMismatch(PronghornError):
    """A model was written, but what is on the disk differs from what was meant to be; nothing was replaced."""

    code = "PH602"


class RowInvalid(PronghornError):
    """A row of the data set is of no known kind, or malformed."""

    code = "PH301"


class NothingSupervised(PronghornError):
    """Rows without a single token to train on."""

    code = "PH302"


class ChatTemplateOpaque(PronghornError):
    """The assistant's turns cannot be told from the rest in what the chat template renders."""

    code = "PH303"


class SequenceTooLong(PronghornError):
    """Rows are longer than the model's context, and truncation was turned off."""

    code = "PH304"


class DatasetUnusable(PronghornError):
    """A data set as a whole cannot be trained on: it is empty, or does not fit the chosen options."""

    code = "PH305"


class CheckpointMissing(PronghornError):
    """A run cannot be resumed: there is no complete checkpoint."""

    code = "PH603"


class OutOfMemory(PronghornError):
    """The GPU's memory did not suffice for a training step."""

    code = "PH501"


class AttentionUnavailable(PronghornError):
    """An attention implementation was asked for by name that does not exist, or cannot do this model on this device."""

    code = "PH504"


class BudgetTooSmall(PronghornError):
    """A training step does not fit into the memory budget, however little its layers keep."""

    code = "PH502"


class BudgetInvalid(PronghornError):
    """A memory budget that is no size, or asks a GPU that is not there."""

    code = "PH503"


class Fp8Unavailable(PronghornError):
    """fp8 products were asked for on a GPU whose matrix units do not multiply e4m3."""

    code = "PH505"


class ChatTemplateMismatch(PronghornError):
    """A chat template writes tokens that the tokenizer does not have, or ends answers with something but its EOS."""

    code = "PH306"


class DocumentUnreadable(PronghornError):
    """A document to make rows of is of no known kind, damaged, or holds no text."""

    code = "PH311"


class SynthesisChanged(PronghornError):
    """Rows made so far stem from other documents or settings than those asked for now; they would be mixed."""

    code = "PH312"


class WeightsMismatch(CheckpointCorrupt):
    """A checkpoint is not for this model: weights are missing (`lm_head.weight`) or of another size."""

    code = "PH105"


class GatedModel(ModelNotFound):
    """The hub gives a model only to those who accepted its terms and are logged in."""

    code = "PH106"


class HubUnreachable(ModelNotFound):
    """The hub does not answer, or this process was told to stay offline."""

    code = "PH107"


class DtypesMixed(PronghornError):
    """Tensors of two dtypes met in one product: Half and Float, BFloat16 and Float."""

    code = "PH206"


class DevicesMixed(PronghornError):
    """Tensors of two devices met in one operation, under DDP or with a model spread over devices."""

    code = "PH207"


class TokenOutOfVocabulary(PronghornError):
    """A token id is beyond the model's embedding, or a label beyond its classes."""

    code = "PH307"


class VersionMismatch(PronghornError):
    """Driver, CUDA, torch, Triton or another compiled package were not made for each other."""

    code = "PH506"


class UnsupportedGpu(PronghornError):
    """The GPU is one that the installed torch or Triton has no code for."""

    code = "PH507"


class GpuFault(PronghornError):
    """A kernel failed on the GPU, and nothing more can be done with it in this process."""

    code = "PH508"


class ResumeMismatch(PronghornError):
    """A checkpoint is of another run: its adapter, optimizer or number of weights is not what is trained now."""

    code = "PH604"


class NonFiniteLoss(PronghornError):
    """The loss or a gradient is NaN or infinite; says which tensor, layer, row and token were first."""

    code = "PH701"


class ProcessesFailed(PronghornError):
    """The processes of a distributed run lost one another: one ended, hung, or came to other collective calls."""

    code = "PH702"


class Int8Unavailable(PronghornError):
    """int8 products were asked for on a GPU whose matrix units do not multiply int8."""

    code = "PH509"


class NotInDropIn(PronghornError, ImportError):
    """A script run in Unsloth's place imports a name of Unsloth that has no counterpart here."""

    code = "PH405"


class DropInUnavailable(PronghornError):
    """A script run in Unsloth's place asks for something that is not done here, or Unsloth itself is loaded already."""

    code = "PH406"


class NotExportable(PronghornError):
    """A model, its RoPE or its vocabulary has no form in the format asked for; nothing was written."""

    code = "PH605"


class ExportDiffers(PronghornError):
    """An export, opened again by what will run it, predicts otherwise than the model; it is kept and marked."""

    code = "PH611"
    #: what was written (a `pronghorn.export.Export`), where somebody wants to go on with it
    export: Any = None


class RequestTooLong(PronghornError):
    """A prompt with its answer is longer than the model's context or than the key/value cache."""

    code = "PH801"


class AdapterUnknown(PronghornError):
    """A request names an adapter that the model does not have."""

    code = "PH802"


class SamplingInvalid(PronghornError):
    """A request's prompt is empty, or a sampling value is outside of its range."""

    code = "PH803"


class EngineRefused(PronghornError):
    """The inference engine cannot run this model, or not as it is now; Transformers' own `generate` still can."""

    code = "PH804"


class UploadFailed(PronghornError):
    """An upload to the hub failed: no token, one without the right to write, or the network; nothing local is lost."""

    code = "PH606"


class CannotServe(PronghornError):
    """The server cannot start: its address is taken, or would be open to others without a token."""

    code = "PH810"


class RunUnreadable(PronghornError):
    """A folder or file holds no record of a training run, or a damaged one."""

    code = "PH703"


class TrainerBusy(PronghornError):
    """A trainer cannot be lent for short trainings: it is training, or makes a new model for every training."""

    code = "PH704"


class NoRateFound(PronghornError):
    """At no learning rate of a test the loss fell."""

    code = "PH705"


class AdapterMismatch(CheckpointCorrupt):
    """An adapter was made for a model with other modules, or modules of other sizes, than the one it is put on."""

    code = "PH108"


class SearchInvalid(PronghornError):
    """A search over settings that cannot be done: no such setting, no values, values out of bounds, too little room."""

    code = "PH706"


class SearchChanged(PronghornError):
    """The trials of an earlier call are of another space, model, data or settings."""

    code = "PH707"


class SearchFailed(PronghornError):
    """No trial of a search finished, its metric raised, or a process of it could not begin."""

    code = "PH708"


class SpeechRowInvalid(RowInvalid):
    """A row of text and codes that a speech model cannot learn from: no codes, other codebooks, codes out of range."""

    code = "PH320"


class CodecMissing(PackageMissing):
    """Rows hold audio, and the codec that turns it into codes is not there."""

    code = "PH321"


class ImageUnreadable(PronghornError):
    """An image of a row cannot be opened."""

    code = "PH313"


class CalibrationMissing(PronghornError):
    """Quantisation is to be fitted to rows, and there are none, or none with text."""

    code = "PH314"


class QuantisationRefused(PronghornError):
    """Dynamic quantisation or its low-rank correction that cannot be made for this model, or not as it was loaded."""

    code = "PH208"
