"""Relay of the clients' key agreement. The server passes messages on and can read none of them."""
