"""Text tasks: `sources` reads data sets, `sets` divides them among clients."""
