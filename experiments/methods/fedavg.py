"""FedAvg on LoRA."""

from fedmosaic.experiments.methods.strategy import Strategy


class FedAvg(Strategy):
    """FedIT: all of LoRA averaged in every round, trained on from there."""

    shares = True
