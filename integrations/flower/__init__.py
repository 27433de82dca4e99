"""FedMosaic over Flower: calls travel as TLS records inside Flower's messages.

`server_app` runs the federation's server and asks every SuperNode in turn what its client has to say;
`client_app` hands the question to the `client` beside it, and its answer back. Both ends of TLS are ours,
with the federation's own certificates: Flower carries what a network carries. See docs/flower.md.
"""
