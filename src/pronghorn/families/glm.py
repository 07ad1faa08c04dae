"""GLM-4 (9B, `glm`) and GLM-4-0414 (`glm4`): Llama that turns neighbouring pairs of the first half of every head, with
gate and up in one module; GLM-4-0414 has norms of what attention and MLP give besides."""

from pronghorn.families.spec import DecoderFamily, LayerParts

GLM = DecoderFamily(
    name="GLM",
    model_types=("glm",),
    prefix="Glm",
    parts=LayerParts(gate_up="gate_up_proj"),
    turns="pairs",
)
GLM4 = DecoderFamily(
    name="GLM-4",
    model_types=("glm4",),
    prefix="Glm4",
    parts=LayerParts(
        gate_up="gate_up_proj",
        attention_output_norm="post_self_attn_layernorm",
        mlp_output_norm="post_mlp_layernorm",
    ),
    turns="pairs",
)
