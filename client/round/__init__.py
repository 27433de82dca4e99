"""One round as a client lives it, against a learner and a transport; it sees no model and no example.

    session, group_session      the steps of a round; where members share sums of their groups (`group_steps`)
    membership                  enrolment, sampling, group key, a server that has lost something
    protection, keyring         what stands before the wire, and under which key
    releases                    what may leave, charged before its noise is drawn
    records                     small files between two steps, from which a restart goes on

The other half of a round is `fedmosaic.server.round`; they meet on the wire alone.
"""
