"""Fish-Speech's dual autoregressive transformer out of two stock decoders, each bound to the fast path by itself.

    e_t = E[token_t] + Σ_k C_k[code_kt]   at frames (optionally / √(K + 1)),   E[token_t] elsewhere
    slow: h = slow(e),  p(token_{t+1}) = softmax(W norm(h_t))
    fast, for every frame at t + 1: [P h_t, F[c_1], …, F[c_{K-1}]] → p(c_1), …, p(c_K)

A frame is K codes, c_1 to c_K; its token is the semantic token of c_1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from pronghorn.data.rows import IGNORED
from pronghorn.engine import binding_of
from pronghorn.engine.forward import readable_head
from pronghorn.engine.loss import summed_loss
from pronghorn.speech.layout import DualARConfig


@dataclass
class DualAROutput(ModelOutput):
    """What `DualARModel` gives.

    Args:
        loss: token_loss + code_weight · code_loss.
        token_loss, code_loss: sums of cross-entropies over their normalisers.
        tokens_correct, codes_correct: how many most likely predictions were right.
        token_logits: [1, T, V]; code_logits: [frames, K, codebook_size]; where they were asked for.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    code_loss: Tensor | None = None
    tokens_correct: Tensor | None = None
    codes_correct: Tensor | None = None
    token_logits: Tensor | None = None
    code_logits: Tensor | None = None


class DualARModel(PreTrainedModel):
    """Fish-Speech's model. `slow` and `fast` are causal LMs of Transformers; `load_speech` binds them."""

    config_class = DualARConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: DualARConfig) -> None:
        super().__init__(config)
        self.slow = AutoModelForCausalLM.from_config(config.slow)
        self.fast = AutoModelForCausalLM.from_config(config.fast)
        wide, narrow = config.slow.hidden_size, config.fast.hidden_size
        self.codebook_embeddings = nn.Embedding(config.codebook_size * config.num_codebooks, wide)
        self.fast_project_in = nn.Linear(wide, narrow) if wide != narrow else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of text and semantic tokens."""
        return self.slow.get_input_embeddings()  # type: ignore[no-any-return]

    def is_semantic(self, tokens: Tensor) -> Tensor:
        """Which tokens stand for a frame."""
        return (tokens >= self.config.semantic_begin_id) & (tokens <= self.config.semantic_end_id)

    def embed(self, input_ids: Tensor, codes: Tensor) -> Tensor:
        """Tokens [B, S] and their frames' codes [B, K, S] (any code below `codebook_size` elsewhere) -> [B, S, H]."""
        embedded = self.slow.get_input_embeddings()(input_ids)
        summed = torch.zeros_like(embedded)
        for k in range(self.config.num_codebooks):
            summed = summed + self.codebook_embeddings(codes[:, k] + k * self.config.codebook_size)
        scale = 1 / math.sqrt(self.config.num_codebooks + 1) if self.config.scale_codebook_embeddings else 1.0
        return torch.where(self.is_semantic(input_ids)[..., None], (embedded + summed) * scale, embedded)

    def run_slow(self, embeddings: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, H] -> behind the final norm, and what the fast transformer reads, both [B, S, H].

        A hook on the last layer takes what comes before the norm, which a decoder does not give.
        """
        held: list[Tensor] = []
        last = self.slow.model.layers[self.config.num_hidden_layers - 1]
        hook = last.register_forward_hook(lambda module, arguments, output: held.append(output))
        try:
            output = self.slow.model(inputs_embeds=embeddings, **call)
        finally:
            hook.remove()
        normed = output.last_hidden_state
        return normed, normed if self.config.norm_fastlayer_input else held[-1].view(normed.shape)

    def run_fast(self, start: Tensor, codes: Tensor) -> Tensor:
        """What the slow transformer left [n, H] and frames' codes [n, K] -> hidden states [n, K, H'], each before the
        code at its place."""
        start = self.fast_project_in(start)
        embedded = self.fast.get_input_embeddings()(codes[:, :-1])
        sequences = torch.cat([start[:, None], embedded.to(start.dtype)], dim=1)
        return self.fast.model(inputs_embeds=sequences, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        codes: Tensor,
        labels: Tensor | None = None,
        frame_rows: Tensor | None = None,
        loss_rows: Tensor | None = None,
        *,
        token_count: int | Tensor | None = None,
        code_count: int | Tensor | None = None,
        code_weight: float = 1.0,
        return_logits: bool = False,
        **stream: Any,
    ) -> DualAROutput:
        """A flat stream of documents, as `SpeechCollator` makes it.

        Args:
            input_ids: [1, T]; codes: [1, K, T], at semantic tokens the frame's.
            labels: [1, T], unshifted, -100 where nothing is learned.
            frame_rows: [n] positions t whose successor is a frame that is learned. Like `loss_rows` they may hold the
                last position, to fill them up to a size: it counts nothing.
            loss_rows: positions with a supervised successor, as in `pronghorn.engine`.
            token_count, code_count: what the sums of losses are divided by; None: their own numbers.
            stream: position_ids, cu_seq_lens_q, … of the documents.
        """
        embeddings = self.embed(input_ids, codes)
        normed, read = self.run_slow(embeddings, use_cache=False, **stream)
        output = DualAROutput()
        if return_logits:
            output.token_logits = self.slow.lm_head(normed)
        if labels is None:
            return output
        # The last position predicts nothing.
        successors = nn.functional.pad(labels[0, 1:], (0, 1), value=IGNORED)
        if loss_rows is None:
            loss_rows = (successors != IGNORED).nonzero().squeeze(1)
        if frame_rows is None:
            frame_rows = self.is_semantic(successors).nonzero().squeeze(1)
        output.token_loss, output.tokens_correct = _sum_of(
            self.slow,
            normed[0].index_select(0, loss_rows),
            successors.index_select(0, loss_rows),
            token_count,
        )
        if frame_rows.numel() == 0:
            output.code_loss, output.codes_correct = normed.new_zeros(()), frame_rows.new_zeros(())
        else:
            frames = codes[0].index_select(1, (frame_rows + 1).clamp(max=input_ids.shape[1] - 1)).T
            unlearned = successors.index_select(0, frame_rows) == IGNORED
            hidden = self.run_fast(read[0].index_select(0, frame_rows), frames)
            if return_logits:
                output.code_logits = self.fast.lm_head(hidden)
            output.code_loss, output.codes_correct = _sum_of(
                self.fast,
                hidden.flatten(0, 1),
                frames.masked_fill(unlearned[:, None], IGNORED).flatten(),
                code_count,
            )
        output.loss = output.token_loss + code_weight * output.code_loss
        return output


def _sum_of(
    causal_lm: Any, rows: Tensor, targets: Tensor, count: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ CE(lm_head(rows [n, H]), targets [n]) / count (None: of the targets), and how many predictions are right."""
    binding = binding_of(causal_lm)
    head = readable_head(causal_lm, binding) if binding is not None and binding.bound else None
    if head is not None:
        return summed_loss(head, rows, targets, count)
    logits = causal_lm.lm_head(rows)
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = nn.functional.cross_entropy(logits.to(wide), targets, reduction="sum")
    learned = (targets != IGNORED).sum() if count is None else count
    return total / learned, (logits.argmax(-1) == targets).sum()
