"""Speech models that read and write a codec's codes: Fish-Speech's two transformers, and Llamas with audio tokens."""

from pronghorn.speech.adapters import add_speech_adapter
from pronghorn.speech.checkpoint import convert_pickle, load_speech, save_speech
from pronghorn.speech.generate import Sampling, generate_codes, generate_frames
from pronghorn.speech.model import DualARModel
from pronghorn.speech.orpheus import OrpheusLayout
from pronghorn.speech.rows import Reference, SpeechRows
from pronghorn.speech.tokenizer import SpeechTokenizer
from pronghorn.speech.trainer import SpeechConfig, SpeechTrainer

__all__ = [
    "DualARModel",
    "OrpheusLayout",
    "Reference",
    "Sampling",
    "SpeechConfig",
    "SpeechRows",
    "SpeechTokenizer",
    "SpeechTrainer",
    "add_speech_adapter",
    "convert_pickle",
    "generate_codes",
    "generate_frames",
    "load_speech",
    "save_speech",
]
