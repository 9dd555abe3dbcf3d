"""A local Lipschitz estimate: the spectral norm of the Jacobian at each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.measures.outputs import named_outputs, sample_rows


def jacobian_norms(
    module: nn.Module, inputs: Tensor, *, iterations: int = 100, tolerance: float = 1e-4, seed: int = 0
) -> Tensor:
    """Largest singular value (B,) of ∂output/∂input at every sample of `inputs` (B, …), in evaluation mode.

    Power iteration with products Jᵀ·v and J·u for all samples at once (J·u as the derivative of Jᵀ·v along u), until no
    estimate moves by more than `tolerance` relatively: an estimate from below. A sample's output must depend on that
    sample alone. The module's mode and gradients are left as they were.

    Raises:
        RuntimeError: the outputs have no derivative, or an operation has no second one.
    """
    training = {name: part.training for name, part in module.named_modules()}
    module.eval()

    generator = torch.Generator().manual_seed(seed)
    direction = _unit(torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype).to(inputs.device))
    norms = inputs.new_zeros(len(inputs))
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            points = inputs.detach().clone().requires_grad_()
            outputs = torch.cat(
                [
                    sample_rows(tensor, len(points))
                    for tensor in named_outputs(module(points.clone())).values()
                    if tensor.is_floating_point()
                ],
                1,
            )  # (B, D), all outputs side by side
            weights = torch.zeros_like(outputs, requires_grad=True)
            (pulled,) = torch.autograd.grad(outputs, points, weights, create_graph=True)  # Jᵀ·weights
            for _ in range(iterations):
                (image,) = torch.autograd.grad(pulled, weights, direction, retain_graph=True)  # J·u
                new = image.norm(dim=1)
                direction = _unit(torch.autograd.grad(outputs, points, image, retain_graph=True)[0])
                settled = bool(((new - norms).abs() <= tolerance * new.clamp_min(1e-30)).all())
                norms = new
                if settled:
                    break
    finally:
        for name, part in module.named_modules():
            part.training = training[name]
    result: Tensor = norms.detach()
    return result


def _unit(values: Tensor) -> Tensor:
    norms = values.flatten(1).norm(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    result: Tensor = values / norms.view(-1, *[1] * (values.ndim - 1))
    return result
