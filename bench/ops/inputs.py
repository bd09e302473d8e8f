"""Is a side right that draws a dropout mask of its own? Its mask is made to show itself.

With the generator at the same seed it is called twice: on inputs whose output is the mask, then on random ones. The second
call's outputs and gradients must be those of that mask in float64, and the mask must keep its share of the elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Drawn(NamedTuple):
    """How an operator's mask shows, and what the operator is for a given mask."""

    p: float
    show: Callable[
        [list[Tensor]], list[Tensor]
    ]  # inputs of these shapes whose output is zero where it is dropped
    kept: Callable[[Tensors], Tensor]  # the mask, out of that output
    exact: Callable[
        ..., Tensor | Tensors
    ]  # the operator, of the mask over the share that is kept, and the inputs
    cut: Callable[[Tensor], Tensor] = lambda x: x  # the part of an input to do it on
    drawn: Callable[[Tensor], Tensor] = lambda kept: kept  # the elements of the mask that count

    def error(self, call: Callable, leaves: Sequence[Tensor]) -> float:
        """The largest relative error of outputs and gradients; infinite where the share of what is kept is off."""
        inputs = [self.cut(t.detach()).clone().requires_grad_() for t in leaves]
        torch.manual_seed(0)
        # with gradients, for a compiler makes another program without
        shown = [t.detach().requires_grad_() for t in self.show(inputs)]
        kept = self.kept(tensors(call(*shown)))
        drawn = self.drawn(kept).double()
        sigma = math.sqrt(self.p * (1 - self.p) / drawn.numel())
        if abs(drawn.mean().item() - (1 - self.p)) > 5 * sigma + 1 / 256:  # some quantise p to eight bits
            return math.inf
        torch.manual_seed(0)
        outputs = tensors(call(*inputs))
        incoming = [torch.randn_like(y) for y in outputs]
        found = [*outputs, *torch.autograd.grad(outputs, inputs, incoming)]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        truth = tensors(self.exact(kept.double() / (1 - self.p), *doubles))
        gradients = torch.autograd.grad(truth, doubles, [g.double() for g in incoming])
        return relative_error(found, [*truth, *gradients])


def tensors(result: Tensor | Tensors) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest norm of a difference over the norm of what is exact."""
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    return torch.stack(errors).max().item()  # unlike Python's max, NaN wins


def of_rows(p: float) -> Drawn:
    """dropout(x)."""
    return Drawn(
        p, lambda inputs: [torch.ones_like(inputs[0])], lambda y: y[0] != 0, lambda kept, x: kept * x
    )


def of_add_norm(p: float, eps: float) -> Drawn:
    """y, h for h = residual + dropout(x + x_bias) and y = LN(h): without residual and bias, h shows the mask."""

    def show(inputs: list[Tensor]) -> list[Tensor]:
        x, residual, weight, bias, x_bias = inputs
        return [torch.ones_like(x), torch.zeros_like(residual), weight, bias, torch.zeros_like(x_bias)]

    def exact(kept: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor):
        h = residual + kept * (x + x_bias)
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h

    return Drawn(p, show, lambda outputs: outputs[1] != 0, exact)


def of_attention(p: float, n_head: int, head_dim: int) -> Drawn:
    """Causal attention of a packed projection, on two sequences of at most D positions: with v = 1 the output is the weights."""

    def apart(qkv: Tensor) -> Tensor:
        return qkv.unflatten(2, (3, n_head, head_dim))  # (B, T, 3, H, D)

    def show(inputs: list[Tensor]) -> list[Tensor]:
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

    return Drawn(p, show, kept, exact, lambda x: x[:2, :head_dim], drawn)
