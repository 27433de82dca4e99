"""A client's examples as read, from files, a hub or Python; imports no model and no tensor."""
