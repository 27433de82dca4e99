"""Base models, tokenizers, examples, the loss, and training and scoring without differential privacy.

Stands on `client.colora` and the settings. Knows no federation: nothing here releases anything.
"""
