"""Images for language models: a frozen encoder, a projector, images as words; releases nothing."""
