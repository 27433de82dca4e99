"""FedMosaic over Flower, whose messages carry gRPC's connections; see docs/flower.md."""
