"""A request of one user: `UserModel.encode`, no gradient, against the same written by hand in PyTorch for one history.

The PyTorch way has the same weights and knows that there is one user: no padding, no mask, its top layer at the newest
row alone, every weight looked up outside the clock.
"""

import torch
import torch.nn.functional as F
from measure import Report, main, medians_ms
from padded_model import PROMPTS, make_batch, make_model
from torch import Tensor

from pcl_ext import UserModel
from pcl_ext.batch import PackedBatch
from pcl_ext.model.backbone import PARTS

SHAPES = [(64, 2, 50), (64, 2, 200), (256, 4, 50)]  # D, H, events
QUICK = [(32, 2, 9)]
COLUMNS = ["what", "PyTorch / encode", "encode", "PyTorch"]


class ByHand:
    """The newest state of one history [n] of ids, with a tail prompt."""

    def __init__(self, model: UserModel, task: str):
        backbone, self.prompt = model.backbone, model.task(task).tail().detach()
        self.heads, self.table = backbone.config.num_heads, backbone.table
        self.position = backbone.position.flip(0)
        self.layers = [
            [(getattr(layer, name).weight, getattr(layer, name).bias) for name in PARTS] for layer in backbone.layers
        ]
        self.norm = (backbone.norm.weight, backbone.norm.bias)

    def __call__(self, items: Tensor) -> Tensor:
        """[1, D]."""
        x = self.table[items] + self.position[-len(items) :]
        x[-PROMPTS:] += self.prompt[-len(items) :]
        for layer in self.layers[:-1]:
            x = self._layer(x, *layer)
        return F.layer_norm(self._newest(x, *self.layers[-1]), x.shape[1:], *self.norm)

    def _layer(self, x: Tensor, norm: tuple, qkv: tuple, *rest: tuple) -> Tensor:
        rows = F.linear(F.layer_norm(x, x.shape[1:], *norm), *qkv)
        q, k, v = rows.view(1, len(x), 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._after(x, mixed[0].transpose(0, 1).flatten(1), *rest)

    def _newest(self, x: Tensor, norm: tuple, qkv: tuple, *rest: tuple) -> Tensor:
        normed, (weight, bias), dim = F.layer_norm(x, x.shape[1:], *norm), qkv, x.shape[1]
        rows = F.linear(normed, weight[dim:], bias[dim:])
        k, v = rows.view(1, len(x), 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = F.linear(normed[-1:], weight[:dim], bias[:dim]).view(1, self.heads, 1, -1)
        return self._after(x[-1:], F.scaled_dot_product_attention(q, k, v).flatten(1).view(1, dim), *rest)

    def _after(self, x: Tensor, mixed: Tensor, out: tuple, norm: tuple, ffn_in: tuple, ffn_out: tuple) -> Tensor:
        x = x + F.linear(mixed, *out)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[1:], *norm), *ffn_in)), *ffn_out)


@torch.no_grad()
def bench(report: Report, dim: int, num_heads: int, events: int) -> None:
    model = make_model(dim, num_heads).eval()
    items = make_batch(64).items[:events]
    batch, by_hand = PackedBatch.from_packed(items, torch.tensor([0, events])), ByHand(model, "items")
    ways = {"encode": lambda: model.encode(batch, ["items"])["items"], "PyTorch": lambda: by_hand(items)}
    torch.testing.assert_close(ways["encode"](), ways["PyTorch"]())  # no speed without truth
    us = {way: 1e3 * ms for way, ms in medians_ms(ways, least=200).items()}
    report.row(f"D {dim}, {events} events", us["PyTorch"] / us["encode"], us["encode"], us["PyTorch"])


if __name__ == "__main__":
    main(f"encode of one user, tail of {PROMPTS}, 2 layers; microseconds", COLUMNS, bench, SHAPES, QUICK)
