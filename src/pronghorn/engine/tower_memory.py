"""What a model that reads images holds besides its language model."""

from __future__ import annotations

from pronghorn.engine.binding import Binding


def vision_bytes(binding: Binding, tokens: int) -> int:
    """Bytes to set aside for what a model has besides its language model, 0 where that is nothing.

    The weights, and what a vision tower holds while it makes all `tokens` of images: a layer's tensors, or those of all
    layers where some are trained. An upper bound, since most tokens are text.
    """
    if not binding.family.reads_images:
        return 0
    planned = {id(p) for part in (binding.decoder, binding.model.lm_head) for p in part.parameters()}
    rest = [p for p in binding.model.parameters() if id(p) not in planned]
    config = binding.model.config
    tower = config.vision_config
    # Qwen2-VL calls the tower's width embed_dim, and its output's hidden_size.
    width = getattr(tower, "embed_dim", None) or tower.hidden_size
    inner = getattr(tower, "intermediate_size", None) or width * tower.mlp_ratio
    if hasattr(config, "mm_tokens_per_image"):
        patches = (tower.image_size // tower.patch_size) ** 2 // config.mm_tokens_per_image
    else:
        patches = tower.spatial_merge_size**2
    layers = getattr(tower, "depth", None) or tower.num_hidden_layers
    kept = layers if any(p.requires_grad for p in rest) else 1
    element = max((p.element_size() for p in rest if p.is_floating_point()), default=0)
    return sum(p.nbytes for p in rest) + tokens * patches * (6 * width + 2 * inner) * element * kept
