"""Refusals: answers that retrying cannot change, with reason and remedy, the same on both sides."""

import enum
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as PackedDetail
from google.protobuf.message import DecodeError
from google.rpc import (
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status

from fedmosaic.protos.errors import FedMosaicError, RefusedError, TransportError

_DOMAIN: Final = "fedmosaic"
_MAX_MESSAGE: Final = 2000


class RefusalKind(enum.Enum):
    """Whose fault it is; the value is the gRPC status code."""

    UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
    NOT_PERMITTED = grpc.StatusCode.PERMISSION_DENIED
    INVALID = grpc.StatusCode.INVALID_ARGUMENT
    TOO_LARGE = grpc.StatusCode.OUT_OF_RANGE
    PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
    CONFLICT = grpc.StatusCode.ALREADY_EXISTS
    EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


_BY_CODE: Final = {kind.value: kind for kind in RefusalKind}


class Refusal(RefusedError):
    """A refusal with a reason, such as ROSTER_DIFFERS, that programs can test, and a remedy for people."""

    def __init__(self, kind: RefusalKind, reason: str, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.kind = kind
        self.reason = reason
        self.message = message
        self.remedy = remedy


def to_status(refusal: Refusal) -> grpc.Status:
    """The gRPC status of a refusal, with its reason and remedy as `google.rpc.ErrorInfo`."""
    message = refusal.message[:_MAX_MESSAGE]
    detail = PackedDetail()
    detail.Pack(
        error_details_pb2.ErrorInfo(
            reason=refusal.reason, domain=_DOMAIN, metadata={"remedy": refusal.remedy[:_MAX_MESSAGE]}
        )
    )
    code: int = refusal.kind.value.value[0]
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code, message=message, details=[detail])
    )
    return status


def from_rpc_error(error: grpc.RpcError, call: str) -> FedMosaicError:
    """What a failed call means: `Refusal` where the server refused, else a `TransportError` to try again."""
    if not isinstance(error, grpc.Call):
        return TransportError(f"{call} failed: {_printable(str(error))}")
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # made up by whoever answered; code and text stand without it
        status = None
    return from_status(error.code(), error.details(), status.details if status is not None else (), call)


def from_status(
    code: grpc.StatusCode, text: str | None, details: Iterable[PackedDetail], call: str
) -> FedMosaicError:
    """As `from_rpc_error`, for a status that came another way than as an exception of gRPC."""
    text = _printable(text or "no details")
    kind = _BY_CODE.get(code)
    if kind is None:
        return TransportError(f"{call} failed: {code.name}: {text}")
    reason, remedy = code.name, ""
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        with suppress(DecodeError):
            if detail.Unpack(info) and info.domain == _DOMAIN:
                reason, remedy = _printable(info.reason), _printable(info.metadata.get("remedy", ""))
    return Refusal(kind, reason, text, remedy)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_MESSAGE])
