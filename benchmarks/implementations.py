"""One step's projection and clipping, by this project's kernels and by what one would write instead."""

from collections.abc import Callable, Sequence

import torch

from llamafactory_ogpsa.kernels import make_plan

from .timing import Step


MAX_NORM = 1.0
# The published rule holds two references at most.
PUBLISHED_RANK = 2

Tensors = Sequence[torch.Tensor]


def ours(gradients: Tensors, basis: Tensors, kernel: str = "auto", groups: Sequence[int] | None = None) -> Step:
    """Build the step with this project's kernels; `groups` as for `make_plan`, None for a group a tensor."""
    rank, device = basis[0].shape[0], gradients[0].device
    groups = list(range(len(basis))) if groups is None else groups
    plan = make_plan(basis, groups, max(groups) + 1, kernel=kernel, device=device)
    plan.warmup([g.dtype for g in gradients])
    inverse_gram = torch.eye(rank, device=device).repeat(max(groups) + 1, 1, 1)
    return lambda: plan.orthogonal_(gradients, inverse_gram, MAX_NORM)


def foreach(gradients: Tensors, basis: Tensors, *_) -> Step:
    """Build the step with torch's multi-tensor calls, and matrix-vector products where there is none.

    Like ours it takes the clipping norm from the coefficients, which saves a pass over the projected gradient.
    """

    def step():
        norms = torch._foreach_norm(gradients)
        coefficients = [torch.mv(b, g) for b, g in zip(basis, gradients)]
        removed = torch.stack(torch._foreach_norm(coefficients)).float()
        norm = (torch.stack(norms).float().square().sum() - removed.square().sum()).clamp(min=0).sqrt()
        for g, b, c in zip(gradients, basis, coefficients):
            g.addmv_(b.t(), c, alpha=-1)
        torch._foreach_mul_(gradients, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    return step


def compiled(gradients: Tensors, basis: Tensors, *_) -> Step:
    """Build the step from two functions of a tensor under torch.compile, which fuses each to one read."""

    @torch.compile(dynamic=True)
    def measured(g, b):
        return (b.float() * g.float()).sum(1), g.float().square().sum()

    @torch.compile(dynamic=True)
    def write(g, b, c, scale):
        g.copy_(scale * (g.float() - (c[:, None] * b.float()).sum(0)))

    def step():
        sums = [measured(g, b) for g, b in zip(gradients, basis)]
        removed = torch.stack([c for c, _ in sums]).square().sum()
        norm = (torch.stack([sq for _, sq in sums]).sum() - removed).clamp(min=0).sqrt()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for g, b, (c, _) in zip(gradients, basis, sums):
            write(g, b, c, scale)

    return step


def published(gradients: Tensors, basis: Tensors, micro_batches: int) -> Step:
    """Build the published rule: references on the host, copied and orthogonalised for every micro-batch and tensor."""
    references = [b.cpu().unbind() for b in basis]
    clip = clip_alone(gradients)

    def step():
        for _ in range(micro_batches):
            for g, host in zip(gradients, references):
                directions = []
                for r in host:
                    u = r.to(g.device, copy=True)
                    for v in directions:
                        u = u - torch.dot(u, v) * v
                    directions.append(u / (u.norm() + 1e-8))
                for u in directions:
                    g.sub_(torch.dot(g, u) * u)
        clip()

    return step


def clip_alone(gradients: Tensors, *_) -> Step:
    """Build what a run without projection does: clip_grad_norm_."""
    parameters = [torch.nn.Parameter(gradient, requires_grad=False) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)


# From gradients [numel], bases [rank, numel] and the micro-batches of a step to the step, which changes the gradients.
IMPLEMENTATIONS: dict[str, Callable[[Tensors, Tensors, int], Step]] = {
    "ours (triton)": lambda g, b, _: ours(g, b, "triton"),
    "ours (torch)": lambda g, b, _: ours(g, b, "torch"),
    "foreach": foreach,
    "torch.compile": compiled,
    "published rule": published,
    "clipping alone": clip_alone,
}


def obstacle(name: str, rank: int) -> str | None:
    """Return why an implementation has no time at this rank, or None."""
    if name == "published rule" and rank > PUBLISHED_RANK:
        return f"holds {PUBLISHED_RANK} references at most"
    return None
