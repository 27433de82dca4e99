"""FedDPA: a shared adapter, then a personal one beside it."""

from fedmosaic.experiments.methods.lora import using
from fedmosaic.experiments.methods.strategy import PERSONAL, SHARED, Strategy, Trainer


class FedDpa(Strategy):
    """Dual personalising adapters (Yang et al. 2024, arXiv 2403.19211), half of the steps each.

    Scored with the mean of both, without instance-wise weights, as in the authors' comparison.
    """

    adapters = (SHARED, PERSONAL)
    shares = True
    scored_with = (SHARED, PERSONAL)
    scored_scale = 0.5

    def train(self, trainer: Trainer) -> None:
        """An odd step goes to the personal adapter."""
        half = trainer.settings.steps // 2
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit(steps=half)
        with using(trainer.model, [SHARED, PERSONAL], [PERSONAL], scale=0.5):
            trainer.fit(steps=trainer.settings.steps - half)
