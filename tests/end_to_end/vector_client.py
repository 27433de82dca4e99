"""One client of a federation of vectors, over gRPC, in a thread or as a process; run by `test_faults.py`.

    vector_client.py FEDERATION MEMBER ADDRESS FAULT

FAULT: none; foreign (a certificate of another authority); nan (pushes values that are not numbers);
kill (dies by SIGKILL in the middle of the first round it trains, once);
kill-idle (dies so in the middle of the first key agreement of a round that others were drawn for).
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import builders
from end_to_end import federation_of_vectors as fv  # after the path it is found on
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1.federation_pb2_grpc import FederationStub


def poison(payload: bytes) -> bytes:
    """The same record with its first value turned into NaN, signed as it is by an honest signer."""
    nan = np.float32("nan").tobytes()
    return payload[: -len(nan)] + nan


def knock_with_a_foreign_certificate(kit: Path, address: str) -> int:
    """Trust the right server, but show it a certificate of another authority."""
    foreign = builders.issue_client(identity.create_authority("vectors"), "vectors", "ben")
    credentials = grpc.ssl_channel_credentials(
        (kit / "authority.pem").read_bytes(), foreign.key_pem, foreign.certificate_pem
    )
    deadline = time.monotonic() + 120.0
    while True:
        # A new channel each time: one that has failed waits before it connects again.
        with grpc.secure_channel(address, credentials) as channel:
            try:
                FederationStub(channel).RoundStatus(pb.RoundStatusRequest(), timeout=30)
            except grpc.RpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            else:
                return 0
        # Nobody listens yet: there was no handshake, so nothing was refused.
        if "Connection refused" not in problem or time.monotonic() > deadline:
            logging.error("%s", problem)
            return 3
        time.sleep(0.2)


def take_part(directory: Path, member: str, address: str, fault: str = "none") -> int:
    """One client's whole part; returns 0, or 3 where it was refused and has said so in the log."""
    kit = directory / "clients" / member
    if fault == "foreign":
        return knock_with_a_foreign_certificate(kit, address)
    transport = fv.dial(directory, member, address, retry_seconds=120.0)
    client = fv.Client(directory, member, fv.MEMBERS.index(member))
    session = client.session(transport)
    if fault == "nan":
        seal = session._protection._cipher.encrypt
        session._protection._cipher.encrypt = lambda *a, **k: poison(seal(*a, **k))  # type: ignore[method-assign]
    marker = kit / "killed-once"
    if fault == "kill" and not marker.exists():
        train = client.learner.train

        def die(*arguments: object) -> None:
            marker.touch()
            train(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        client.learner.train = die
    if fault == "kill-idle" and not marker.exists():
        agree, post = session._agree_with_those_drawn, transport.post_key_message

        def post_and_die(message: KeyMessage) -> None:
            post(message)
            if message.stage == "opening":
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def agree_and_die(number: int) -> None:
            transport.post_key_message = post_and_die  # type: ignore[method-assign]
            agree(number)

        session._agree_with_those_drawn = agree_and_die  # type: ignore[method-assign, assignment]
    try:
        session.run()
    except FedMosaicError as error:
        logging.error("%s: %s", type(error).__name__, error)
        return 3
    return 0


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return take_part(Path(sys.argv[1]), *sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
