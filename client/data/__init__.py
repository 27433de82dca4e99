"""A client's examples as they are read: from files of any format, a hub, or objects of the user's own.

    sources     rows of a file, a folder, a split on a hub, or a list
    records     a row as an example: its columns, its conversation, its name; all sets of a client

Imports no model and no tensor.
"""
