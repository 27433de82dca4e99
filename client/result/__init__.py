"""What a member has after a run: its model, loaded, compared, handed on.

`saved` knows how to load it again, `comparison` whether sharing helped, `ending` the last lines of a client;
`export`, `chat` and `predict` are commands. Nothing here is sent anywhere.
"""
