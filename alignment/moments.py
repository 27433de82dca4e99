"""Second moments of pairs of activations, accumulated batch by batch in float64.

Everything the alignment computes (ridge, Procrustes, canonical correlations, even the paper's gradient
descent, whose loss is quadratic) is a function of these matrices, so no activation has to be kept.

Axes: N rows (aligned positions), D coordinates of the anchor, E coordinates of the other model.
"""

from dataclasses import dataclass, field

import torch

from fedmosaic.protos.errors import ModelError


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a pair of vectors (anchor's u, other model's v), divided by the number of rows.

    Attributes:
        count: Number of rows.
        anchor_DD: (D, D) float64, mean of u uᵀ.
        cross_DE: (D, E) float64, mean of u vᵀ.
        model_EE: (E, E) float64, mean of v vᵀ.
    """

    count: int
    anchor_DD: torch.Tensor = field(repr=False)
    cross_DE: torch.Tensor = field(repr=False)
    model_EE: torch.Tensor = field(repr=False)


class MomentSums:
    """Running sums of one pair of variables."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[torch.Tensor] = []
        self._products: list[torch.Tensor] = []

    def update(self, anchor_ND: torch.Tensor, model_NE: torch.Tensor) -> None:
        """Add rows.

        Args:
            anchor_ND: (N, D) rows of the anchor.
            model_NE: (N, E) rows of the other model, of the same positions.

        Raises:
            ModelError: A value is not finite, or the numbers of rows differ.
        """
        if len(anchor_ND) != len(model_NE):
            raise ModelError(
                f"{len(anchor_ND)} rows of the anchor and {len(model_NE)} of the model do not pair."
            )
        if not len(anchor_ND):
            return
        # One batch in float32 loses nothing that matters; it is the long sum that needs float64.
        u, v = anchor_ND.float(), model_NE.float()
        new_sums = [u.sum(0).double(), v.sum(0).double()]
        new_products = [(u.T @ u).double(), (u.T @ v).double(), (v.T @ v).double()]
        if not all(bool(torch.isfinite(part).all()) for part in new_products):
            raise ModelError(
                "An activation is not finite on public text; the model's weights are damaged or its dtype is "
                "too narrow. Load it in float32."
            )
        self.count += len(u)
        if not self._sums:
            self._sums, self._products = new_sums, new_products
            return
        for total, part in zip(self._sums + self._products, new_sums + new_products, strict=True):
            total += part

    def finish(self, *, centred: bool) -> Moments:
        """Return the moments.

        Args:
            centred: Subtract the means (covariances), or not (raw second moments).

        Raises:
            ModelError: There are fewer than two rows.
        """
        if self.count < 2:
            raise ModelError(
                f"Only {self.count} positions of the two models could be paired on the public text; give more "
                "text, in a script that both tokenizers know."
            )
        products = [total / self.count for total in self._products]
        if centred:
            mean_D, mean_E = (total / self.count for total in self._sums)
            products = [
                products[0] - torch.outer(mean_D, mean_D),
                products[1] - torch.outer(mean_D, mean_E),
                products[2] - torch.outer(mean_E, mean_E),
            ]
        return Moments(self.count, *products)
