"""Every client alone."""

from fedmosaic.experiments.methods.strategy import Strategy


class LocalOnly(Strategy):
    """Every client alone."""
