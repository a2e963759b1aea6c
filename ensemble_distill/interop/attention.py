"""Attention whose probabilities can be tapped, in place of modules that keep them inside one fused call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_distill.errors import UsageError


class ExplicitAttention(nn.Module):
    """Self-attention with the parameters, and the names of these, of an ``nn.MultiheadAttention`` [B, T, width].

    ``softmax`` gives the probabilities [B, heads, T, T]: a row for each query, over the keys. It is called as the
    original is, with one tensor as query, key and value and without masks, and returns (output [B, T, width], None).
    Raises UsageError for an original with other axes, other widths of keys or values, or added keys; ValueError when
    called with other keys or values than the query, or asked for weights.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        refused = original.in_proj_weight is None or original.bias_k is not None or original.add_zero_attn
        if refused or not original.batch_first:
            raise UsageError("only plain self-attention with batch_first=True can be written out")
        self.heads = original.num_heads
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(original.dropout)
        self.out_proj = original.out_proj
        self.train(original.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if key is not query or value is not query or need_weights:
            raise ValueError("written-out attention takes one tensor as query, key and value, and returns no weights")
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = torch.unflatten(projected, 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
        mixed = self.dropout(self.softmax(scores)) @ values
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None
