"""The committed stubs are those of the committed proto file."""

from pathlib import Path

import pytest

from fedmosaic.protos import generate
from fedmosaic.protos.v1 import federation_pb2 as pb


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is a development dependency")
    pytest.importorskip("mypy_protobuf", reason="mypy-protobuf is a development dependency")
    for name, content in generate.generate(tmp_path).items():
        committed = (generate.ROOM / "v1" / name).read_bytes()
        assert content == committed, f"{name} is stale: run `make protos`"


def test_names_that_clients_of_other_languages_rely_on() -> None:
    service = pb.DESCRIPTOR.services_by_name["Federation"]
    assert service.full_name == "fedmosaic.v1.Federation"
    assert {method.name for method in service.methods} == {
        "Enrol",
        "Pull",
        "UploadStatus",
        "Push",
        "RoundStatus",
        "Report",
        "PostKeyMessage",
        "ReadKeyMessages",
    }
