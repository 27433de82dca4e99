"""DRAKE's layout: read its scenarios, write them as files that `fedmosaic run` takes."""
