"""Ids at a fixed number of bits, and log-probabilities at eight: tensors to bytes and back, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_distill.codec import id_bits
from ensemble_distill.codecs.domain import check_mass, check_range

# Below this distance from a row's highest log-probability all codes are the lowest: e^-20 is 2e-9.
RANGE = 20.0
STEPS = 254


def pack_ids(ids_BK: Tensor, classes: int) -> Tensor:
    """int64 [B, K] to uint8 [B, ⌈K·bits/8⌉]: id i at bits i·bits and up, lowest bit first."""
    bits = id_bits(classes)
    rows, count = ids_BK.shape
    flat = (ids_BK[:, :, None] >> torch.arange(bits, device=ids_BK.device) & 1).reshape(rows, count * bits)
    flat = torch.nn.functional.pad(flat, (0, -count * bits % 8)).reshape(rows, -1, 8)
    return (flat << torch.arange(8, device=ids_BK.device)).sum(dim=2).to(torch.uint8)


def unpack_ids(packed: Tensor, count: int, classes: int) -> Tensor:
    """uint8 [B, ⌈K·bits/8⌉] to int64 [B, K], which may lie beyond the classes where nothing was packed so."""
    bits = id_bits(classes)
    at = torch.arange(count, device=packed.device) * bits
    reach = -(-(bits + 7) // 8)  # bytes that an id may touch
    padded = torch.nn.functional.pad(packed, (0, reach))
    value = torch.zeros(len(packed), count, dtype=torch.int64, device=packed.device)
    for i in range(reach):
        value |= padded[:, at // 8 + i].long() << (8 * i)
    return value >> (at % 8) & ((1 << bits) - 1)


def to_codes(logprobs_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities to uint8 codes [B, K] and the range float16 [B, 2] that 1 and 255 stand for; 0 is −inf."""
    finite = logprobs_BK > -math.inf
    high = logprobs_BK.amax(dim=1, keepdim=True).float()
    low = logprobs_BK.masked_fill(~finite, math.inf).amin(dim=1, keepdim=True).float()
    low = torch.maximum(low, high - RANGE)
    # A row without a finite value (all of it is a draw, say) has no range.
    ends = torch.cat([low, high], dim=1).nan_to_num(0.0, 0.0, 0.0).half()
    low, high = ends[:, :1].float(), ends[:, 1:].float()
    step = ((high - low) / STEPS).clamp(min=1e-9)
    codes = ((logprobs_BK.float() - low) / step).nan_to_num(0.0, 0.0, 0.0).round().clamp(0, STEPS) + 1
    return torch.where(finite, codes, 0.0).to(torch.uint8), ends


def from_codes(codes_BK: Tensor, ends_B2: Tensor) -> Tensor:
    """float32 log-probabilities [B, K] of codes, before any normalisation; BadRow for ends that are none."""
    check_range(ends_B2)
    low, high = ends_B2[:, :1].float(), ends_B2[:, 1:].float()
    values = low + (codes_BK.float() - 1) * ((high - low) / STEPS)
    return values.masked_fill(codes_BK == 0, -math.inf)


def normalised(logprobs_BK: Tensor, residual_B: Tensor, bits: int) -> Tensor:
    """Kept log-probabilities whose exp sums to one minus the residual (a probability).

    BadRow where they did not nearly do so before, as values of so many bits.
    """
    total = torch.logsumexp(logprobs_BK, dim=1, keepdim=True)
    check_mass(total[:, 0].exp() + residual_B, bits)
    left = torch.log1p(-residual_B.clamp(0, 1))[:, None]
    return torch.where(logprobs_BK > -math.inf, logprobs_BK - total + left, -math.inf)
