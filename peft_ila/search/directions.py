"""
The rank-1 directions of an adapter's weight deltas: what each is worth, and gates on those that are kept.

No gate inside the model is needed: for ΔW = Σ_k γ_k·b_k·a_kᵀ, ∂L/∂γ_k is ⟨∂L/∂b_k, b_k⟩. So one backward pass to B
measures all directions, in every layer that PEFT can compute.
"""

from collections.abc import Iterable
from typing import Any

import torch

from ..export.ranks import check_reducible
from ..tuner.model import ILAModel
from .measurement import Measurement, Step


class Directions:
    """
    The singular directions of an adapter's deltas. They replace its own A and B; each product stays, to rounding.

    Args:
        ila ([`ILAModel`]): A model with one active adapter.

    Attributes:
        modules (`list[str]`): The module of each direction. Those of one module lie together, the largest first.
        singular_values (`torch.Tensor`): Of (α/r)·B·A, of shape (directions,), fp32 on the CPU.
        sizes (`torch.Tensor`): The number of parameters of each direction, in + out, of shape (directions,).
    """

    def __init__(self, ila: ILAModel) -> None:
        (name,) = ila.active_adapters
        self._factors = list(ila.factors())
        check_reducible(ila.peft_config[name], ((module, b) for module, *_, b in self._factors))
        self._b: list[torch.Tensor] = []
        values, sizes = [], []
        for _, scaling, a, b in self._factors:
            new_a, new_b, singular_values = singular_directions(a.detach(), b.detach())
            a.data.copy_(new_a)
            b.data.copy_(new_b)
            self._b.append(b.detach().clone())
            values.append(scaling * singular_values.cpu())
            sizes += [a.shape[1] + b.shape[0]] * a.shape[0]
        self.singular_values = torch.cat(values)
        self.modules = [module for module, _, a, _ in self._factors for _ in range(a.shape[0])]
        self.sizes = torch.tensor(sizes)

    @torch.no_grad()
    def set_gates(self, gates: torch.Tensor) -> None:
        """Multiply each direction by its γ; `gates` has the shape (directions,)."""
        parts = gates.split([a.shape[0] for _, _, a, _ in self._factors])
        for (*_, weight), b, part in zip(self._factors, self._b, parts):
            weight.copy_(b * part.to(b))

    def slope(self, measurement: Measurement, step: Step, gates: torch.Tensor) -> torch.Tensor:
        """∂L/∂γ of one step at these gates, both of shape (directions,), fp32 on the CPU."""
        self.set_gates(gates)
        return measurement.slope(step, self._contracted)

    def _contracted(self) -> torch.Tensor:
        products = [
            # without a gradient, no batch reached the module
            b.new_zeros(b.shape[1]).float() if weight.grad is None else (weight.grad.float() * b.float()).sum(0)
            for (*_, weight), b in zip(self._factors, self._b)
        ]
        # on one device, since each copy to the CPU waits for the GPU; a model may be spread over several
        return torch.cat([product.to(self._b[0].device) for product in products])

    def attributions(self, measurement: Measurement, steps: Iterable[Step], gates: torch.Tensor) -> torch.Tensor:
        """What each direction is worth beside those that are on: the mean of −∂L/∂γ, of shape (directions,)."""
        slopes = [self.slope(measurement, step, gates) for step in steps]
        if not slopes:
            raise ValueError(
                "The training data have no batch left to measure on. Check that they fill a batch and have labels; a "
                "stream that cannot be read again must be longer."
            )
        return -torch.stack(slopes).mean(0)

    def learn_gates(
        self, measurement: Measurement, steps: Iterable[Step], kept: torch.Tensor, number: int, learning_rate: float
    ) -> torch.Tensor:
        """
        Learn one real γ for each group of directions that is kept, by Adam; A and B stay. γ may pass 1.

        `kept` is the group of each direction, or −1 where it is not kept, of shape (directions,), as the result. The
        learning rate falls to 0 over `number` steps.
        """
        on = kept >= 0
        gamma = torch.nn.Parameter(torch.ones(int(kept.max()) + 1))
        adam = torch.optim.Adam([gamma], learning_rate)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(adam, lambda taken: 1 - taken / number)
        for _, step in zip(range(number), steps):  # in this order, or a step is taken in vain
            slope = self.slope(measurement, step, gamma.detach()[kept] * on)
            gamma.grad = torch.zeros_like(gamma).index_add(0, kept[on], slope[on])
            adam.step()
            schedule.step()
        return gamma.detach()[kept] * on


def singular_directions(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Factors of the same product B·A whose rows and columns are its singular directions.

    By thin QR of A (r, in) and B (out, r) and the SVD of an r × r matrix, never from the product, in fp32. Returns
    √S·Vᵀ of the shape of A, U·√S of the shape of B, and S of shape (r,), which is 0 beyond the rank of B·A.
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    missing = a.shape[0] - len(s)  # of a module that is narrower than r
    new_a, new_b = s.sqrt()[:, None] * (vh @ q_a.T), (q_b @ u) * s.sqrt()
    pad = torch.nn.functional.pad
    return pad(new_a, (0, 0, 0, missing)), pad(new_b, (0, missing)), pad(s, (0, missing))
