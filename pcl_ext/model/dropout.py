"""Dropout that takes a third of the time of PyTorch's on a CPU, where drawing is most of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16  # a number drawn has 16 bits


class Dropout(nn.Dropout):
    """As nn.Dropout, from torch's own generator: four values of x for each 64-bit number drawn on a CPU.

    There p is rounded to the nearest 1/65536; what is kept is divided by 1 - p, and so is its gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        keep = drawn >= dropped - LEVELS // 2
        return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
