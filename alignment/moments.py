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
        anchor_mean_D: (D,) float64, mean of u.
        model_mean_E: (E,) float64, mean of v.
    """

    count: int
    anchor_DD: torch.Tensor = field(repr=False)
    cross_DE: torch.Tensor = field(repr=False)
    model_EE: torch.Tensor = field(repr=False)
    anchor_mean_D: torch.Tensor = field(repr=False)
    model_mean_E: torch.Tensor = field(repr=False)

    def centred(self) -> "Moments":
        """The covariances, as moments of variables of mean zero."""
        u, v = self.anchor_mean_D, self.model_mean_E
        return Moments(
            self.count,
            self.anchor_DD - torch.outer(u, u),
            self.cross_DE - torch.outer(u, v),
            self.model_EE - torch.outer(v, v),
            torch.zeros_like(u),
            torch.zeros_like(v),
        )


class MomentSums:
    """Running sums of one pair of variables."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[torch.Tensor] = []

    def update(self, anchor_ND: torch.Tensor, model_NE: torch.Tensor) -> None:
        """Add (N, D) rows of the anchor and (N, E) of the model at the same positions.

        The same tensor twice gives moments of the anchor alone. `ModelError` if a value is not finite.
        """
        if len(anchor_ND) != len(model_NE):
            raise ModelError(f"{len(anchor_ND)} rows of the anchor and {len(model_NE)} of the model differ.")
        if not len(anchor_ND):
            return
        # One batch in float32 loses nothing that matters; it is the long sum that needs float64.
        u, v = anchor_ND.float(), model_NE.float()
        own = u.T @ u
        alone = anchor_ND is model_NE
        parts = [own, own if alone else u.T @ v, own if alone else v.T @ v, u.sum(0), v.sum(0)]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ModelError(
                "An activation is not finite on public text; the model's weights are damaged or its dtype is "
                "too narrow. Load it in float32."
            )
        self.count += len(u)
        if not self._sums:
            self._sums = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
        for total, part in zip(self._sums, parts, strict=True):
            total += part

    def finish(self) -> Moments:
        """The moments; the sums are used up, so that nothing is held twice. `ModelError` below two rows."""
        if self.count < 2:
            raise ModelError(
                f"Only {self.count} positions of the two models could be paired on the public text; give "
                "more text, in a script that both tokenizers know."
            )
        sums, self._sums = self._sums, []
        return Moments(self.count, *(total.div_(self.count) for total in sums))
