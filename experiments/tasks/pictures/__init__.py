"""Picture tasks: sources, sets, and the projector that is trained on public pictures."""
