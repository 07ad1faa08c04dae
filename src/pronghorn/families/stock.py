"""Model types that run Transformers' own forward, and what the blocks would have to learn first."""

LATENT = "latent attention"
LAYER_NORM = "LayerNorm"

#: `config.model_type` -> what its decoder layers have that no block computes
STOCK = {
    "axk1": f"{LATENT}, and a norm of what the experts give",
    "deepseek_v32": f"{LATENT} over the keys that an indexer picks",
    "gemma3n_text": "embeddings and projections of each layer's own, and layers that share keys and values",
    "gemma4_text": "embeddings and projections of each layer's own, and layers that share keys and values",
    "gpt2": f"{LAYER_NORM} with biases, learned positions and an MLP without a gate",
    "gpt_neox": f"{LAYER_NORM} with biases and an MLP without a gate",
    "glm_moe_dsa": f"{LATENT} over the keys that an indexer picks",
    "hunyuan_v1_dense": "norms of q and k after the rotation",
    "kimi_linear": f"linear attention in most layers, {LATENT} in the others",
    "longcat_flash": f"two blocks of {LATENT} in a layer, beside experts of which some do nothing",
    "mistral4": f"{LATENT} whose queries grow with their position",
    "nemotron": f"{LAYER_NORM} by 1 + w and an MLP without a gate",
    "phi": f"attention and MLP side by side on one {LAYER_NORM}, and an MLP without a gate",
    "stablelm": f"{LAYER_NORM} with biases",
    "starcoder2": f"{LAYER_NORM} with biases and an MLP without a gate",
}
