"""AdamW for tables of which a step touches few rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_IGNORED = ("maximize", "amsgrad", "capturable", "differentiable", "fused")  # by the step of rows
_STEP = inspect.unwrap(torch.optim.AdamW.step)  # without hooks: those of this class are called already


class RowAdamW(torch.optim.AdamW):
    """torch's AdamW, but where a gradient is sparse only the rows it names move.

    Such a row sees AdamW as if its own steps were all there are: moments, bias correction and weight decay stand still
    while it has no gradient. Time and memory of a step are those of the rows, beside the two moments of the table.
    A parameter's gradients are sparse in every step or in none. ValueError for options of torch's that rows have not.
    """

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **options)
        for group in self.param_groups:
            if refused := [name for name in _IGNORED if group[name]]:
                raise ValueError(f"RowAdamW takes no {refused[0]}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As torch's, which leaves steps where they were saved: those of rows are read beside the rows."""
        super().load_state_dict(state)
        for parameter, kept in self.state.items():
            if kept["step"].dim():
                kept["step"] = kept["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """closure, where there is one, computes the loss and its gradients first, as torch's optimisers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_dense()
        sparse = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    sparse.append((parameter, parameter.grad))
                    self._step_rows(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None
        _STEP(self)
        for parameter, grad in sparse:
            parameter.grad = grad
        return loss

    def _check_dense(self) -> None:
        """ValueError, before anything moves, for a dense gradient where they were sparse."""
        for parameter, kept in self.state.items():
            if parameter.grad is not None and not parameter.grad.is_sparse and kept["step"].dim():
                raise ValueError("RowAdamW: a parameter of sparse gradients has a dense one")

    def _step_rows(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rows, grad, state = grad.indices()[0], grad.values(), self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = parameter.new_zeros(len(parameter), 1, dtype=torch.float32)  # of each row
        (beta1, beta2), rate = group["betas"], group["lr"]
        steps = state["step"][rows] + 1
        mean = state["exp_avg"][rows].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        first, second = (1 - beta ** steps.double() for beta in (beta1, beta2))  # 1 - .999 in float32 is off by 1e-5
        scale = (square / second.to(square.dtype)).sqrt_().add_(group["eps"])
        values = parameter[rows] * (1 - rate * group["weight_decay"])
        values -= rate * (mean / first.to(mean.dtype)) / scale
        for table, update in (
            (state["step"], steps),
            (state["exp_avg"], mean),
            (state["exp_avg_sq"], square),
            (parameter, values),
        ):
            table.index_copy_(0, rows, update)
