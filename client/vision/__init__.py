"""Images for language models.

    encoder, features       a frozen encoder, and what it makes of image files
    projector               vectors in the width of a language model, or from a model's own tower
    inputs                  images as words of a prompt

Stands on `client.model`, which knows nothing of images; releases nothing.
"""
