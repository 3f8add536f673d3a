"""Muon, the optimizer of hidden matrices (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).

The momentum of each matrix is made orthogonal before it is added: a step then is as large in the
directions that gradients seldom take as in those that they always take. torch.optim.Muon does the
same, always in bfloat16. Here the run's own precision is used, for a machine without bfloat16 is
far slower in it than in float32.
"""

import torch

from lib import ranks


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """Nearly U V^T of a matrix U S V^T (rows, columns) or of each of (N, rows, columns), by matmuls
    in dtype.

    Singular values are divided by their norm. All but the smallest, those below 0.002, come near 1,
    between 0.65 and 1.25, by Newton-Schulz steps with Jordan's factors.
    """
    norm = matrices.norm(dim=(-2, -1), keepdim=True)
    x = (matrices / norm.clamp(min=1e-7)).to(dtype)
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT  # x x^T is then the smaller of its two squares
    # beta * a + alpha * b @ c at once, which is faster than one by one and rounds less
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        square = x @ x.mT
        factor = add_product(square, square, square, beta=-4.7750, alpha=2.0315)
        x = add_product(x, factor, x, beta=3.4445)
    if is_tall:
        x = x.mT
    return x


class Muon(torch.optim.Optimizer):
    """For matrices; dtype is that of orthogonalize.

    A step changes weights by 0.2 * lr in root mean square, about as AdamW does, so both take the
    same rates and weight decay (Liu et al. 2025, arXiv:2502.16982).
    """
    def __init__(self, matrices, lr: float, weight_decay: float, dtype: torch.dtype,
                 momentum: float = 0.95):
        groups = []
        for shape in sorted({matrix.shape for matrix in matrices}):
            groups.append({"params": [matrix for matrix in matrices if matrix.shape == shape]})
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # each has matrices of one shape
            # a GPU wants much at once, a CPU's cache is small; ranks share it
            size = (8 if group["params"][0].is_cuda else 1) * ranks.world_size()
            for i in range(0, len(group["params"]), size):
                self.step_together(group["params"][i:i + size], group)

    def step_together(self, matrices: list, group: dict):
        stack = torch.stack([self.look_ahead(matrix, group) for matrix in matrices])
        updates = ranks.share(self.orthogonalize, stack)
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape)**0.5)

    def orthogonalize(self, stack: torch.Tensor) -> torch.Tensor:
        alone = stack.squeeze(0)  # a stack of one takes longer than its matrix
        return orthogonalize(alone, self.dtype).reshape(stack.shape)

    def look_ahead(self, matrix, group: dict) -> torch.Tensor:
        """Nesterov's momentum, in which the newest gradient counts once more."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
        return matrix.grad.lerp(state["momentum"], group["momentum"])
