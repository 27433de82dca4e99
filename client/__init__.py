"""One client of a federation: adapter, training, task profile, and its life over the rounds.

    client                              the one place where a client is put together
    preflight                           what can be found out before enrolling
    result                              what a member has afterwards
    learner, profile, dp                the model's side of a round
    vision, model, colora               models; they know no federation
    statement                           what is said afterwards
    round                               a session, against a learner and a transport; it sees no model
    ledger, planning, witness           what is charged, planned, and countersigned
    transport, state, progress, data    gRPC, disk, a person, examples as they are read
    settings, assets                    no model is imported to read them

Each line imports lines below it only. Never imports `server`.
"""

import os

# Read when gRPC is first imported. What it logs below an error quotes the server as it is, signs that command
# a terminal included; what matters of it, this package says in its own words.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
import grpc  # noqa: F401  # so that it reads the line above
