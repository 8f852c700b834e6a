"""Whether a part of a layer is no more than its weights, which the ops read past its forward."""

from torch import nn

FORWARD = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Conv1d)}


def does_more(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling part may do what its weights do not say: another forward than that of kind, or hooks.

    An adapter in its place is one (LoRA, a quantised product); what computes the weight itself, a parametrisation, is
    none. Hooks of all modules at once, which torch has for debugging, do not count.
    """
    own = part.__dict__
    return bool(
        type(part).forward is not FORWARD[kind]
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
