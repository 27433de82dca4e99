"""FedMosaic over Flower: calls travel as TLS records inside Flower's messages.

`server_app` runs the federation's server and asks every SuperNode what its client has to say; `client_app`
hands the question to the `client` beside it. Both ends of TLS are ours. See docs/flower.md.
"""
