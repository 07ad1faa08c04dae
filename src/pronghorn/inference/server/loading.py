"""The model that a server serves, and its engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pronghorn.inference.server.calls import Chosen
from pronghorn.inference.server.model import ServedModel
from pronghorn.inference.server.worker import EngineLike
from pronghorn.inference.variants import load_variants


def load_served(
    model_name: str,
    adapters: Mapping[str, str],
    *,
    max_batch: int,
    max_context: int | None = None,
    **loading: Any,
) -> tuple[EngineLike, ServedModel]:
    """An engine on a model with its adapters, and what a server has to know of them.

    Args:
        model_name, adapters, loading: as `load_variants`'.
        max_batch, max_context: as the engine's.

    Raises:
        PronghornError: what loading raises; EngineRefused for a model that the engine cannot run.
    """
    from pronghorn.inference.engine import Engine

    model, variants = load_variants(model_name, adapters, **loading)
    engine = Engine(model, max_batch=max_batch, max_context=max_context)
    base = next((variant.name for variant in variants if variant.adapter is None), variants[0].name)
    served = ServedModel(
        variants={variant.name: variant for variant in variants},
        base=base,
        context=engine.max_context,
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        created=int(time.time()),
        chosen=usual_choice(model),
    )
    return engine, served


def usual_choice(model: Any) -> Chosen:
    """How the checkpoint's generation config draws tokens; nothing where it does not draw."""
    config = getattr(model, "generation_config", None)
    if not getattr(config, "do_sample", False):
        return Chosen()
    return Chosen(
        temperature=getattr(config, "temperature", None),
        top_p=getattr(config, "top_p", None),
        top_k=getattr(config, "top_k", None),
        min_p=getattr(config, "min_p", None),
        repetition_penalty=getattr(config, "repetition_penalty", None),
    )
