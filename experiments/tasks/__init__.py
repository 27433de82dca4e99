"""Tasks as JSON lines of examples, written by `fedmosaic tasks`: readers, sets, and one projector."""
