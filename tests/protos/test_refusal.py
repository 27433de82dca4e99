"""A refusal arrives at the client as it left the server."""

from typing import TypeAlias

import grpc
import pytest
from google.protobuf.any_pb2 import Any as PackedDetail
from google.rpc import status_pb2
from grpc_status import rpc_status

from fedmosaic.protos.errors import RefusedError, TransportError
from fedmosaic.protos.refusal import Refusal, RefusalKind, from_rpc_error, to_status

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


class Failed(grpc.RpcError, grpc.Call):
    """A failed call, as a stub raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Metadata = ()):
        self._values = (code, details, trailing)

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> Metadata:  # type: ignore[override]  # the stubs want a class of their own
        return self._values[2]

    # Of a call that is over nothing else is asked.
    add_callback = cancel = initial_metadata = is_active = time_remaining = None  # type: ignore[assignment]


def failed(refusal: Refusal) -> Failed:
    status = to_status(refusal)
    return Failed(status.code, status.details, status.trailing_metadata)


def _made_up(code: int, value: bytes) -> bytes:
    detail = PackedDetail(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=value)
    content: bytes = status_pb2.Status(code=code, message="no", details=[detail]).SerializeToString()
    return content


@pytest.mark.parametrize(
    "trailing",
    [
        pytest.param(b"\xff\xff", id="no status"),
        pytest.param(_made_up(5, b""), id="another code than the call's"),
        pytest.param(_made_up(3, b"\xff\xff"), id="no error info in it"),
    ],
)
def test_details_that_a_hostile_server_made_up_leave_code_and_text(trailing: bytes) -> None:
    call = Failed(grpc.StatusCode.INVALID_ARGUMENT, "no", (("grpc-status-details-bin", trailing),))
    got = from_rpc_error(call, "enrol")
    assert isinstance(got, Refusal)
    assert (got.reason, got.message, got.remedy) == ("INVALID_ARGUMENT", "no", "")


@pytest.mark.parametrize("kind", RefusalKind)
def test_kind_reason_message_and_remedy_survive(kind: RefusalKind) -> None:
    sent = Refusal(kind, "ROSTER_DIFFERS", "roster is ab, expected cd", "get the newest roster")
    got = from_rpc_error(failed(sent), "enrol")
    assert isinstance(got, Refusal)
    assert isinstance(got, RefusedError)
    assert (got.kind, got.reason, got.message, got.remedy) == (
        kind,
        "ROSTER_DIFFERS",
        "roster is ab, expected cd",
        "get the newest roster",
    )
    assert str(got) == "roster is ab, expected cd; get the newest roster"


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL]
)
def test_faults_that_time_may_cure_are_no_refusals(code: grpc.StatusCode) -> None:
    got = from_rpc_error(Failed(code, "socket closed"), "pull")
    assert isinstance(got, TransportError)
    assert not isinstance(got, RefusedError)
    assert "pull failed" in str(got)


def test_a_refusal_without_details_still_has_a_reason() -> None:
    got = from_rpc_error(Failed(grpc.StatusCode.PERMISSION_DENIED, "no"), "push")
    assert isinstance(got, Refusal)
    assert got.reason == "PERMISSION_DENIED"


def test_hostile_text_cannot_break_a_log_line() -> None:
    got = from_rpc_error(Failed(grpc.StatusCode.INVALID_ARGUMENT, "a\nb\x1b[31m" + "x" * 9999), "push")
    assert "\n" not in str(got)
    assert "\x1b" not in str(got)
    assert len(str(got)) < 3000


def test_details_are_the_standard_error_info() -> None:
    call = failed(Refusal(RefusalKind.CONFLICT, "UPLOAD_DIFFERS", "m", "r"))
    (detail,) = rpc_status.from_call(call).details
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
