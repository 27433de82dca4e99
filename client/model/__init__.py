"""Base models, tokenizers, examples, the loss, and training and scoring without differential privacy.

Knows no federation: nothing here releases anything.
"""
