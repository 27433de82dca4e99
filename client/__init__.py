"""One client of a federation: adapter, training, task profile, and its life over the rounds.

    client                                    the one place where a client is put together
    preflight                                 what can be found out before enrolling
    learner, profile, dp, vision, model, colora    the model's side; models know no federation
    session, membership, protection, keyring  a round, against a learner and a transport; it sees no model
    releases, ledger, records, state          what may leave, what is charged, what is kept
    statement, result, progress               what is said, to whom
    transport, witness, settings, assets      gRPC, another's eyes; no model is imported to read settings

Never imports `server`.
"""

import os

# Read when gRPC is first imported. What it logs below an error quotes the server as it is, signs that command
# a terminal included; what matters of it, this package says in its own words.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
import grpc  # noqa: F401
