"""Is an implementation right that draws a dropout mask of its own?

With the generator at the same seed it is called twice: on inputs whose output reveals the mask, then on random ones. The second
call's outputs and gradients must be those of that mask in float64, and the mask must keep its share of the elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.examples import as_tuple

Tensors = tuple[Tensor, ...]


class DropoutCheck(NamedTuple):
    """How an operator reveals its mask, and what it computes for a given mask."""

    p: float
    reveal: Callable[
        [list[Tensor]], list[Tensor]
    ]  # inputs of these shapes whose output is zero where it is dropped
    kept: Callable[[Tensors], Tensor]  # the mask, out of that output
    # the operator, of the mask divided by the keep probability, and of the inputs
    exact: Callable[..., Tensor | Tensors]
    cut: Callable[[Tensor], Tensor] = lambda x: x  # the part of an input to check with
    drawn: Callable[[Tensor], Tensor] = lambda kept: kept  # the elements of the mask that count

    def error(self, call: Callable, leaves: Sequence[Tensor]) -> float:
        """The largest relative error of outputs and gradients; infinite where the share that is kept is off."""
        inputs = [self.cut(t.detach()).clone().requires_grad_() for t in leaves]
        torch.manual_seed(0)
        # with gradients, for a compiler makes another program without
        kept = self.kept(as_tuple(call(*(t.detach().requires_grad_() for t in self.reveal(inputs)))))
        drawn = self.drawn(kept).double()
        sigma = math.sqrt(self.p * (1 - self.p) / drawn.numel())
        if abs(drawn.mean().item() - (1 - self.p)) > 5 * sigma + 1 / 256:  # some quantise p to eight bits
            return math.inf
        torch.manual_seed(0)
        outputs = as_tuple(call(*inputs))
        incoming = [torch.randn_like(y) for y in outputs]
        found = [*outputs, *torch.autograd.grad(outputs, inputs, incoming)]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        truth = as_tuple(self.exact(kept.double() / (1 - self.p), *doubles))
        gradients = torch.autograd.grad(truth, doubles, [g.double() for g in incoming])
        return relative_error(found, [*truth, *gradients])


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ‖found − exact‖ / ‖exact‖."""
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    return torch.stack(errors).max().item()  # unlike Python's max, NaN wins


def row_check(p: float) -> DropoutCheck:
    """dropout(x)."""
    return DropoutCheck(
        p, lambda inputs: [torch.ones_like(inputs[0])], lambda y: y[0] != 0, lambda kept, x: kept * x
    )


def add_layer_norm_check(p: float, eps: float) -> DropoutCheck:
    """y, h for h = residual + dropout(x + x_bias) and y = LN(h): without residual and bias, h reveals the mask."""

    def reveal(inputs: list[Tensor]) -> list[Tensor]:
        x, residual, weight, bias, x_bias = inputs
        return [torch.ones_like(x), torch.zeros_like(residual), weight, bias, torch.zeros_like(x_bias)]

    def exact(
        kept: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor
    ) -> Tensors:
        h = residual + kept * (x + x_bias)
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h

    return DropoutCheck(p, reveal, lambda outputs: outputs[1] != 0, exact)


def attention_check(p: float, n_head: int, head_dim: int) -> DropoutCheck:
    """Causal attention of a packed projection, on two sequences of at most D positions: where v is the identity, the output is the weights."""

    def apart(qkv: Tensor) -> Tensor:
        return qkv.unflatten(2, (3, n_head, head_dim))  # (B, T, 3, H, D)

    def reveal(inputs: list[Tensor]) -> list[Tensor]:
        qkv = apart(inputs[0].detach().clone())
        qkv[:, :, 2] = torch.eye(qkv.shape[1], head_dim, dtype=qkv.dtype, device=qkv.device)[:, None]
        return [qkv.flatten(2)]

    def exact(kept: Tensor, qkv: Tensor) -> Tensor:
        q, k, v = apart(qkv).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        visible = torch.ones_like(kept[0, 0], dtype=torch.bool).tril()
        scores = (q @ k.mT / math.sqrt(head_dim)).masked_fill(~visible, -math.inf)
        return (kept * torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)

    def drawn(kept: Tensor) -> Tensor:
        row, column = torch.tril_indices(*kept.shape[2:], device=kept.device)
        return kept[:, :, row, column]

    def kept(outputs: Tensors) -> Tensor:
        weights = outputs[0].unflatten(2, (n_head, head_dim)).transpose(1, 2)  # (B, H, T, D)
        return weights[..., : weights.shape[2]] != 0

    return DropoutCheck(p, reveal, kept, exact, lambda x: x[:2, :head_dim], drawn)
