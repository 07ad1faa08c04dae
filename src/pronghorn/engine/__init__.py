"""The fast path on stock Transformers models: instance binding, nothing global."""

from pronghorn.engine.bind import Binding, base_causal_lm, bind, binding_of

__all__ = ["Binding", "base_causal_lm", "bind", "binding_of"]
