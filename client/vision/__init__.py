"""Images for language models: a frozen encoder, a projector, and images as words of a prompt.

Stands on `client.model`, which knows nothing of images; releases nothing.
"""
