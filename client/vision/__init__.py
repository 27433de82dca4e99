"""Pictures for language models: a frozen encoder, a projector, and pictures as words of a prompt.

Stands on `client.model`, which knows nothing of pictures; releases nothing.
"""
