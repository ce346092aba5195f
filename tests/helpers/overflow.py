"""An overflow of half precision, in any precision."""

import torch


class Overflow(torch.autograd.Function):
    """Finite forwards, inf backwards: what a scaled half-precision backward does."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf
