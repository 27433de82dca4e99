"""Models, tokenizers, examples, loss, training, scoring, without DP: no federation, no release."""
