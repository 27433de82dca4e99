"""Traces of a round's stages for OpenTelemetry, where `server.toml` names a collector; else nothing.

A span tells its stage, when it began and ended, whether it failed, and what `Traces.span` takes: no loss,
count, score, value, address or text of an error. A round's spans are one trace.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

from fedmosaic import __version__
from fedmosaic.protos.errors import ConfigurationError

Stage = Literal["push", "close", "sum", "aggregate", "pull"]
"""An admitted upload; a round's end; the sums of a section; one recipient's of them; an aggregate sent."""
_COLLECTOR_SECONDS: Final = 2.0
"""How long a collector is waited for; what it does not take in time is lost, and nothing waits for it."""


class Traces:
    """Spans of one run; where `exporter` is None there are none, and no package is needed for them."""

    def __init__(self, federation: str, exporter: Any = None) -> None:
        """Prepare; `exporter` is a span exporter of OpenTelemetry."""
        self._provider: Any = None
        self._round: Any = None
        if exporter is None:
            return
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # The resource is no `Resource.create`, which adds what it finds of machine and process.
        names = {"service.name": "fedmosaic-server", "service.version": __version__}
        resource = Resource({**names, "service.namespace": federation})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fedmosaic.server")
        self._api = trace

    def open_round(self, number: int) -> None:
        """Begin the trace of a round, and end that of the one before."""
        if self._provider is not None:
            before, told = self._round, {"fedmosaic.round": number}
            self._round = self._tracer.start_span("fedmosaic.round", attributes=told)
            if before is not None:
                before.end()

    @contextmanager
    def span(self, stage: Stage, number: int, client: str = "", section: str = "") -> Iterator[None]:
        """A stage of the open round; `number` is of the round that its messages name."""
        if self._provider is None:
            yield
            return
        told = {"round": number, "client": client, "section": section}
        attributes = {f"fedmosaic.{name}": value for name, value in told.items() if value}
        within = self._api.set_span_in_context(self._round or self._api.INVALID_SPAN)
        span = self._tracer.start_span(f"fedmosaic.{stage}", context=within, attributes=attributes)
        try:
            yield
        except BaseException:
            span.set_status(self._api.StatusCode.ERROR)  # without a text, which may quote what came
            raise
        finally:
            span.end()

    def close(self) -> None:
        """End the trace of the round, and send what is left."""
        if self._provider is not None:
            if self._round is not None:
                self._round.end()
            self._provider.shutdown()


def exporter_to(url: str | None) -> Any:
    """The exporter to a collector, by OTLP over HTTP; None where none is named.

    Headers, such as a password, come from `OTEL_EXPORTER_OTLP_HEADERS`. ConfigurationError if the package is
    missing.
    """
    if url is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigurationError(
            "traces_url needs OpenTelemetry: install fedmosaic[tracing], or leave the key out"
        ) from None
    return OTLPSpanExporter(endpoint=url, timeout=_COLLECTOR_SECONDS)
