"""What aligned models share: the data of the alignment's measurements, and how far two models agree."""
