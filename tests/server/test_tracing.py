"""Traces tell a round's stages and nothing else, and are off unless a collector is named."""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.protos.wire import encode_upload_header
from fedmosaic.server import run
from fedmosaic.server.tracing import Traces, exporter_to

COLLECTOR = "https://collector.example.org:4318/v1/traces"


def test_a_round_over_grpc_is_one_trace_of_its_stages(
    federation: Any,
    authority: Any,
    connect: Any,
    start_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="fedmosaic[tracing] is not installed"
    )
    exporter = memory.InMemorySpanExporter()
    monkeypatch.setattr(run, "exporter_to", lambda url: exporter if url == COLLECTOR else None)
    tls = {"tls": authority.server(), "listen": "127.0.0.1:0"}
    server = start_server(federation.settings(tmp_path / "state", traces_url=COLLECTOR, **tls))
    members = {client: connect(server, client) for client in federation.clients}
    for client, transport in members.items():
        run_id = transport.enrol(federation.enrolment()).run_id
        if client == "clinic-a":  # breaks off after its header
            header = encode_upload_header(federation.upload(run_id, client, 1).header())
            with (
                authority.channel(server, client) as channel,
                pytest.raises(Exception, match="the upload ended"),
            ):
                rpc.FederationStub(channel).Push(iter([pb.PushRequest(header=header)]), timeout=30)
        transport.push(federation.upload(run_id, client, 1))
        with pytest.raises(Refusal):  # judged before it is a stage
            transport.push(federation.upload(run_id, client, 3))
    for client, transport in members.items():
        assert transport.pull(2).round == 2, client
    server.stop()
    spans = exporter.get_finished_spans()
    told = sorted((s.name.removeprefix("fedmosaic."), *map(str, s.attributes.values())) for s in spans)
    expected = [
        ("round", "1"),
        ("round", "2"),
        ("close", "1"),
        ("sum", "1", "shared"),
        ("push", "1", "clinic-a"),
    ]
    for client in federation.clients:
        expected += [("push", "1", client), ("aggregate", "1", client, "shared"), ("pull", "2", client)]
    assert told == sorted(expected)
    assert {name for s in spans for name in s.attributes} == {
        f"fedmosaic.{name}" for name in ("round", "client", "section")
    }
    assert {s.context.trace_id for s in spans if s.name == "fedmosaic.pull"} == {
        s.context.trace_id
        for s in spans
        if s.name == "fedmosaic.round" and s.attributes["fedmosaic.round"] == 2
    }
    (broken,) = [s for s in spans if not s.status.is_unset]
    assert (broken.name, broken.status.description, broken.events) == ("fedmosaic.push", None, ())
    assert not any(s.events or s.links for s in spans)
    assert set(spans[0].resource.attributes) == {"service.name", "service.version", "service.namespace"}


def test_without_a_collector_nothing_is_needed_and_nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert exporter_to(None) is None
    off = Traces("fed", exporter_to(None))
    off.open_round(1)
    with off.span("close", 1):
        pass
    off.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"install fedmosaic\[tracing\]"):
        exporter_to(COLLECTOR)


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        (COLLECTOR, True),
        ("http://127.0.0.1:4318/v1/traces", True),
        ("http://collector/v1/traces", False),
        ("collector:4318", False),
        ("http://127.0.0.1.example.org/", False),
    ],
)
def test_what_is_told_leaves_the_machine_over_tls_alone(
    url: str, taken: bool, federation: Any, tmp_path: Path
) -> None:
    if taken:
        assert federation.settings(tmp_path, traces_url=url).traces_url == url
        return
    with pytest.raises(ValidationError, match="http:// only on this machine"):
        federation.settings(tmp_path, traces_url=url)
