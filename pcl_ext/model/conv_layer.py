"""The layer of NextItNet: two causal dilated convolutions over packed rows, no padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext import ops
from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.dropout import Dropout
from pcl_ext.model.layout import Layout
from pcl_ext.model.plain_part import does_more

KERNEL = 3
DILATIONS = (1, 2, 4, 8)  # of one block after another, again and again


class ConvLayer(nn.Module):
    """A residual block: x + relu(norm(conv(relu(norm(conv x))))), the second dilation twice the first.

    (Yuan et al., 2019, figure 3b.) A row sees itself and up to 6 dilations back. Before a history lie the rows of its
    prefix, and zeros before these. What later rows need of earlier ones is what the two convolutions read.
    """

    def __init__(self, config: BackboneConfig, depth: int):
        super().__init__()
        dilation, dim = DILATIONS[depth % len(DILATIONS)], config.dim
        self.conv_in = nn.Conv1d(dim, dim, KERNEL, dilation=dilation)
        self.norm_in = nn.LayerNorm(dim)
        self.conv_out = nn.Conv1d(dim, dim, KERNEL, dilation=2 * dilation)
        self.norm_out = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        self.dilations = (dilation, 2 * dilation)

    def forward(
        self, x: Tensor, layout: Layout, before: tuple[Tensor, Tensor] | None, read: str
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [T, D] -> the output of the rows that are read, as `Backbone.run` says, and what the convolutions read.

        before  the same [M, D] of the prefix
        """
        before_in, before_out = before or (None, None)
        hidden = torch.relu(self.norm_in(_convolve(self.conv_in, self.dilations[0], x, before_in, layout)))
        kept = (x, hidden)
        if read == "none":
            return x[:0], kept
        rows = layout.newest if read == "newest" else None
        branch = _convolve(self.conv_out, self.dilations[1], hidden, before_out, layout, rows)
        branch = torch.relu(self.norm_out(branch))
        return (x if rows is None else x.index_select(0, rows)) + self.dropout(branch), kept


def _convolve(
    conv: nn.Conv1d, step: int, x: Tensor, before: Tensor | None, layout: Layout, rows: Tensor | None = None
) -> Tensor:
    """The convolution at every row, or at rows [m]: one product of what each sees with the kernel as a matrix."""
    seen = layout.look_back(KERNEL, step, rows).take(x, before)
    if does_more(conv, nn.Conv1d):  # it is given what each row sees, `step` apart again
        spread = seen.new_zeros(len(seen), x.shape[1], (KERNEL - 1) * step + 1)
        spread[:, :, ::step] = seen.unflatten(1, (KERNEL, -1)).transpose(1, 2)
        return conv(spread)[:, :, 0]
    return ops.linear(seen, conv.weight.transpose(1, 2).flatten(1), conv.bias)
