"""Tasks as JSON lines of examples: converters from the corpora that wheels carry."""
