"""One client: adapter, training, task profile, and its life over the rounds."""
