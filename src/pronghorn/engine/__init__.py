"""The fast path on stock Transformers models: instance binding, nothing global."""

from pronghorn.engine.auto import auto_class
from pronghorn.engine.bind import bind, binding_of
from pronghorn.engine.binding import AUTO, Binding, base_causal_lm
from pronghorn.engine.modes import evaluating
from pronghorn.engine.step import TrainingStep
from pronghorn.engine.tasks import LanguageTask, StepOutput, Task

__all__ = [
    "AUTO",
    "Binding",
    "LanguageTask",
    "StepOutput",
    "Task",
    "TrainingStep",
    "auto_class",
    "base_causal_lm",
    "bind",
    "binding_of",
    "evaluating",
]
