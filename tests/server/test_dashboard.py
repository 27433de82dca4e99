"""The dashboard: what it shows of a real run, who may read it, and what it never tells."""

import dataclasses
import html as markup
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from waiting import wait_until

from end_to_end import federation_of_vectors as fv
from fedmosaic import cli
from fedmosaic.privacy.audit import AUDIT, AuditLog
from fedmosaic.protos.errors import ConfigurationError, StateError
from fedmosaic.protos.messages import Phase
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.dashboard import site as site_module
from fedmosaic.server.dashboard.metrics import LABELS, METRICS, exposition
from fedmosaic.server.dashboard.records import Events, Records, Snapshot, Status
from fedmosaic.server.dashboard.site import USER, Site, html
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit
from fedmosaic.server.storage.store import Store

PASSWORD = "correct-horse-battery"  # noqa: S105  # of a test
HOSTILE = "<script>alert('x')</script>\"&"


def login(password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{USER}:{password}".encode()).decode()}


def get(
    site: Site, path: str = "/", headers: Any = None, method: str = "GET", context: Any = None
) -> http.client.HTTPResponse:
    host, port = urlsplit(site.url).hostname or "", site.server_address[1]
    line = http.client.HTTPConnection(host, port, timeout=30)
    if context is not None:
        line = http.client.HTTPSConnection(host, port, timeout=30, context=context)
    line.request(method, path, headers=login() if headers is None else headers)
    return line.getresponse()


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    with ExitStack() as opened:

        def start(settings: Any, listen: str = "127.0.0.1:0", tls: Any = None) -> Site:
            site = opened.enter_context(Site(listen, Records(lambda: settings), PASSWORD, tls))
            threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
            opened.callback(site.shutdown)
            return site

        yield start


@pytest.fixture
def played(federation: Any, coordinator: Any) -> Any:
    """A coordinator of which one round is closed."""
    federation.play(coordinator, 1)
    coordinator._run.account._told_at = -100.0
    coordinator.advance()
    return coordinator


@pytest.fixture
def seen(played: Any) -> Snapshot:
    return Records(lambda: played.settings).look()


def test_a_real_run_is_shown_as_it_goes(tmp_path: Path, serve: Any) -> None:
    """Over gRPC on loopback, with a server and five clients that hold a vector in place of a model."""
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 2))
    kit = directory / "server"
    with Server(kit).background() as port, ExitStack() as stack:
        site = serve(settings_from_kit(kit))

        def read() -> str:
            return " ".join(re.sub(r"<[^>]*>", " ", get(site).read().decode()).split())

        def page(*words: str) -> str:
            wait_until(lambda: all(word in read() for word in words), lambda: (words, read()))
            return read()

        page("Round 1 of 2, open", "ada awaited , never enrolled", "No member has handed over its statement")
        clients = fv.clients_of(directory)
        transports = {
            name: fv.dial(directory, name, port, retry_seconds=60.0, wait_seconds=0.5) for name in clients
        }
        sessions = {name: client.session(transports[name]) for name, client in clients.items()}
        for closing in (*transports.values(), *clients.values()):
            stack.callback(closing.close)
        assert fv.run_all(sessions) == {}
        text = page("All 2 rounds are over", "key-epoch epoch 1; members ada, ben, cid, dee, eva")
        assert "5 of 5 members have enrolled" in text
        assert "ada – " in text
        told = get(site, "/metrics").read().decode()
    assert "fedmosaic_round 3\n" in told
    assert "fedmosaic_finished 1\n" in told
    assert "fedmosaic_last_round_recipients 5\n" in told
    assert re.search(r'fedmosaic_received_bytes_total\{member="ada"\} [1-9]', told)
    for line in told.splitlines():
        name, labels = re.fullmatch(r"(?:# \w+ )?(\w+)(\{.*\})?.*", line).groups()  # type: ignore[union-attr]  # it fits
        assert name in METRICS
        assert set(re.findall(r"(\w+)=", labels or "")) <= LABELS
    private = ("loss", "accura", "score", "example", "similarity", "profile", "gradient")
    assert not any(word in name for word in private for name in METRICS)
    assert not any(word in text for word in ("loss", "accura", "score", "clipped", "gradient"))


def test_what_is_awaited_refused_and_compared_is_shown(
    federation: Any, clock: Any, serve: Any, store_url: str, tmp_path: Path
) -> None:
    played = Coordinator(federation.settings(tmp_path / "state", store_url=store_url), clock)
    federation.play(played, 1)
    federation.push(played, 2, federation.clients[:2])
    played.audit.refused("spiffe://fedmosaic/fed/client/mallory", "pull", "NOT_ON_ROSTER")
    played.report("clinic-b", federation.statement(played.run_id, "clinic-b"))
    played._run.store.add_report("clinic-c", b"[" * 1000, 0.0)  # as an older server took it
    played._run.account._told_at = -100.0
    played.advance()
    site = serve(played.settings)
    text = get(site).read().decode()
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    assert re.search(r"Awaited until \S+ \S+ \(in [2-6]\d s\): clinic-c, clinic-d, clinic-e", plain)
    assert "clinic-a uploaded" in plain
    assert "NOT_ON_ROSTER 1 ×" in plain
    assert "call pull; reason NOT_ON_ROSTER; who spiffe://fedmosaic/fed/client/mallory" in plain
    results: Any = played.summary()["results"]
    similarity = results[0]["similarity"][0][1]
    assert f">{similarity:.2f}</td>" in text
    assert "clinic-b 1.000 1.000 1.000 1.000 1.000 1.000 1e-05 example" in plain
    assert "clinic-c its statement cannot be shown" in plain
    told = get(site, "/metrics").read().decode()
    assert 'fedmosaic_reported_epsilon{member="clinic-b",adversary="recipient"} 1.0\n' in told
    assert 'fedmosaic_refused_total{reason="NOT_ON_ROSTER"} 1\n' in told
    assert "fedmosaic_awaited 3\n" in told
    assert "clipped" not in told + text
    played.close()


def test_everything_is_escaped(seen: Snapshot) -> None:
    told = {"shared": {f"clinic-a{HOSTILE}": HOSTILE}}
    line = dataclasses.replace(
        seen,
        run={"id": HOSTILE, "started_at": 0.0},
        status=Status(
            at=seen.now,
            round=1,
            phase=Phase.OPEN,
            arrived=(),
            waiting_for=(HOSTILE,),
            until=None,
            message=HOSTILE,
        ),
        rounds=[{**seen.rounds[0], "refusals": told, "uniform_weights_for": [HOSTILE]}],
        compared=([HOSTILE], [[None]], 1),
        traffic={HOSTILE: {"received": 1, "sent": 1}},
        reported={HOSTILE: None},
        refused={HOSTILE: 1},
    )
    text = html(line, "nonce")
    assert markup.escape(HOSTILE, quote=False).split("'")[0] in text
    assert "<script" not in text
    assert "'x'" not in text
    for outside in ("http://", "https://", "src=", "href=", "@import", "url("):
        assert outside not in text
    assert r'reason="<script>alert(' + r"'x')</script>\"&" in exposition(line)


def test_nobody_reads_without_the_password(played: Any, serve: Any) -> None:
    site = serve(played.settings)
    for headers in ({}, login("wrong-horse-battery"), {"Authorization": "Basic \xff"}, {"Authorization": ""}):
        for path in ("/", "/metrics", "/none"):
            answer = get(site, path, headers)
            assert (answer.status, answer.read()) == (401, b"Unauthorized\n")
            assert "Basic" in answer.headers["WWW-Authenticate"]
    assert get(site, "/none").status == 404
    assert get(site, method="POST").status == 501
    nonces = set()
    page = ("/", "style-src 'nonce-([^']+)")
    for path, pattern in (page, page, ("/metrics", "style-src '(none)'")):
        answer = get(site, path)
        policy = answer.headers["Content-Security-Policy"]
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "Python" not in str(answer.headers)
        nonce = re.search(pattern, policy)
        assert nonce is not None
        nonces.add(nonce[1])
        assert path != "/" or f'nonce="{nonce[1]}"' in answer.read().decode()
    assert len(nonces) == 3


def test_others_reach_it_over_tls_alone(
    played: Any, serve: Any, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="it needs the server's certificate"):
        serve(played.settings, "0.0.0.0:0")
    assert serve(played.settings, "127.0.0.1:0", authority.server()).tls is None
    monkeypatch.setattr(site_module, "_is_loopback", lambda _: False)
    site = serve(played.settings, "localhost:0", authority.server())
    with pytest.raises((http.client.HTTPException, OSError)):
        get(site)
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    assert get(site, context=trusted).status == 200
    authority.server()  # renewed in its place
    assert get(site, context=trusted).status == 200
    trusted.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        get(site, context=trusted)
    with pytest.raises(ConfigurationError, match=r"cannot listen on .*in use"):
        serve(played.settings, f"localhost:{site.server_address[1]}", authority.server())


def test_peers_that_say_nothing_take_a_few_threads_and_no_more(
    played: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "_REQUESTS", 2)
    site = serve(played.settings)
    silent = [http.client.HTTPConnection("127.0.0.1", site.server_address[1]) for _ in range(2)]
    for line in silent:
        line.connect()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        get(site)
    silent[0].close()

    def answers() -> bool:
        try:
            return get(site).status == 200
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return False

    wait_until(answers)
    silent[1].close()


def test_the_database_is_only_read(federation: Any, store_url: str, tmp_path: Path) -> None:
    settings = federation.settings(tmp_path / "state", store_url=store_url)
    with pytest.raises(StateError, match="start the server first"):
        Records(lambda: settings)
    assert not (tmp_path / "server.db").exists()
    written = Store(store_url, durable=False)
    with pytest.raises(StateError, match="there is no run in"):
        Records(lambda: settings)
    written.put({"run": json.dumps({"id": "0" * 32, "started_at": 0.0})})
    reader = Store(store_url, durable=False, reading=True)
    assert reader.get_json("run")["id"] == "0" * 32
    with pytest.raises(StateError, match=r"(?i)read-?only"):
        reader.put({"run": "other"})
    written.close()


def test_a_server_that_stays_silent_and_a_damaged_state_are_told(played: Any, serve: Any) -> None:
    seen = Records(lambda: played.settings).look()
    assert seen.silent_seconds is None
    assert "said nothing for 9 min" in html(dataclasses.replace(seen, now=seen.now + 560.0), "")
    assert "has said nothing yet" in html(dataclasses.replace(seen, status=None), "")
    path = played.settings.state_dir / "status.json"
    path.write_text("{}")
    answer = get(serve(played.settings))
    assert (answer.status, b"status.json is damaged" in answer.read()) == (503, True)


def test_the_audit_log_is_followed_past_torn_lines_and_another_file(tmp_path: Path) -> None:
    events, log = Events(tmp_path / AUDIT), AuditLog(tmp_path)
    events.read()
    assert not events.latest
    for who in ("a", "b"):
        log.refused(who, "pull", "NOT_ON_ROSTER")
    with (tmp_path / AUDIT).open("ab") as file:
        file.write(b'{"time"')
    events.read()
    assert events.refused == {"NOT_ON_ROSTER": 2}
    with (tmp_path / AUDIT).open("ab") as file:
        file.write(b": 3}\n")
    events.read()
    assert [line and line.fields["who"] for line in events.latest] == [None, "b", "a"]
    log.close()
    (tmp_path / AUDIT).unlink()
    AuditLog(tmp_path).refused("c", "pull", "MALFORMED")
    events.read()
    assert events.refused == {"MALFORMED": 1}


def test_the_command_says_where_it_is_and_ends_when_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = fv.make_federation(tmp_path / "f", fv.terms("mask", 2)) / "server"
    fv.coordinator_of(tmp_path / "f").close()
    arguments = ["dashboard", "--kit", str(kit), "--listen", "127.0.0.1:0"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop() -> None:
        while signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    try:
        for extra, words in (
            ((), rf"at http://127.0.0.1:\d+/, user {USER}, password \S{{22}}\n"),
            (("--password-file", str(secret)), rf"at http://127.0.0.1:\d+/, user {USER}\n"),
        ):
            thread = threading.Thread(target=stop)
            thread.start()
            assert cli.main([*arguments, *extra]) == 0
            thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)
            assert re.search(words, capfd.readouterr().out)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    secret.write_text("short")
    assert cli.main([*arguments, "--password-file", str(secret)]) == 2
    assert "at least 16 characters" in capfd.readouterr().err
    secret.chmod(0o644)
    assert cli.main([*arguments, "--password-file", str(secret)]) == 2
    assert "can be read by other users" in capfd.readouterr().err
    assert cli.main([*arguments[:3], "--listen", "0.0.0.0"]) == 2  # noqa: S104  # what is refused
    assert "there is no port" in capfd.readouterr().err


_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(_BROWSER is None, reason="no Chromium on this machine")
def test_the_page_fits_a_screen_and_a_telephone(seen: Snapshot, tmp_path: Path) -> None:
    names = [f"hospital-of-the-northern-region-{index}" for index in range(20)]
    wide = dataclasses.replace(
        seen,
        compared=(names, [[0.5] * 20] * 20, 1),
        traffic={name: {"received": 10**9, "sent": 10**9} for name in names},
    )
    (tmp_path / "page.html").write_text(html(wide, "n"), encoding="utf-8")
    # Frames of both widths measure the page in one start of the browser.
    frames = "".join(f'<iframe src="page.html" width="{w}" height="900"></iframe>' for w in (1280, 420))
    measure = (
        "onload = () => document.title = [...document.querySelectorAll('iframe')].map(frame => "
        "frame.contentDocument.documentElement.scrollWidth).join(' ')"
    )
    (tmp_path / "frames.html").write_text(f"<title></title>{frames}<script>{measure}</script>")
    options = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --dump-dom".split()
    command = [str(_BROWSER), *options, (tmp_path / "frames.html").as_uri()]
    shown = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    widths = re.search(r"<title>(\d+) (\d+)</title>", shown)
    assert widths is not None, shown[:300]
    assert (int(widths[1]) <= 1280, int(widths[2]) <= 420) == (True, True), widths[0]
