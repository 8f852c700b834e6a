"""Several readouts of one label task, learned side by side from other starts, averaged into one memory on closing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pcl_ext.model.backbone import NamedModules
from pcl_ext.model.heads import LabelHead
from pcl_ext.model.memories import ItemMemory, LearnedPool, Memory

OWN = ("item_memory", "pooled")  # readouts that each member has for itself


class Member(nn.Module):
    """What one member learns for itself: its own readouts and a head over these and the shared ones."""

    def __init__(self, memories: Mapping[str, Memory], head: LabelHead):
        super().__init__()
        self.memories, self.head = NamedModules(), head
        for name, memory in memories.items():
            self.memories[name] = memory


def folded_width(name: str, width: int, members: int, outputs: int) -> int:
    """Features of a readout of the members after `fold`."""
    return min(outputs, members * width) if name == "item_memory" else members * width


@torch.no_grad()
def fold(shared: Mapping[str, Memory], members: list[Member], build: Callable[[str], Memory]) -> Member:
    """One member whose output is the mean of the members' outputs, up to rounding.

    shared  memories with features, in the head's order; those named in OWN are replaced by each member's
    build   makes an empty folded readout, on the members' device and in their dtype

    All that follows an item memory is linear: its table times the head's weights, averaged, is a table again, with one
    number an item and output. What a learned pooling reads is not, so its units are put side by side.
    """
    share = 1.0 / len(members)
    heads = [member.head.linear for member in members]
    own, columns, start = {}, [], 0
    for name, memory in shared.items():
        part = slice(start, start + memory.num_features)
        start = part.stop
        weights = [head.weight[:, part] * share for head in heads]
        if name not in OWN:
            columns.append(sum(weights))
            continue
        own[name] = build(name)
        columns.append(_fold_readout(own[name], [member.memories[name] for member in members], weights))
    head = LabelHead(sum(part.shape[1] for part in columns), len(heads[0].weight)).to(heads[0].weight)
    head.linear.weight.copy_(torch.cat(columns, 1))
    head.linear.bias.copy_(sum(one.bias for one in heads) * share)
    head.unit.copy_(members[0].head.unit)
    return Member(own, head)


def _fold_readout(folded: Memory, parts: list[Memory], weights: list[Tensor]) -> Tensor:
    """Fill a folded readout from the members', whose heads have these weights [C, F]; -> weights of its features."""
    if isinstance(folded, LearnedPool):
        folded.linear.weight.copy_(torch.cat([part.linear.weight for part in parts]))
        folded.linear.bias.copy_(torch.cat([part.linear.bias for part in parts]))
        return torch.cat(weights, 1)
    assert isinstance(folded, ItemMemory)
    if folded.num_features < sum(part.num_features for part in parts):
        folded.table.copy_(sum(part.table @ weight.T for part, weight in zip(parts, weights)))
        return torch.eye(len(weights[0]), device=folded.table.device, dtype=folded.table.dtype)
    folded.table.copy_(torch.cat([part.table for part in parts], 1))
    return torch.cat(weights, 1)
