"""`reslab serve` as processes: what a person types wrong, what clients do wrong, and how it ends."""

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

import reslab
from reslab.serve import server as server_module
from reslab.serve import workers as workers_module
from reslab.serve.parser import HEAD_BYTES
from reslab.serve.server import Settings, _bind, _claim, _config, _Server, serve
from reslab.serve.service import Limits
from reslab.serve.uploads import BODY_SECONDS
from tests.serve.serving import Server, as_json, image, make_run, serving
from tests.test_cli import one_line

LARGE = bytes(16 << 20)  # more than the buffers between two processes hold


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run, "--max-body", "1") as server:
        yield server


def test_wrong_calls_are_one_line(cli: Callable[..., subprocess.CompletedProcess[str]], run: Path) -> None:
    one_line(cli("serve", "nowhere"), 2, "a finished run has model/spec.json")
    one_line(cli("serve", run, "--host", "0.0.0.0"), 2, "set RESLAB_TOKEN or --token, or let anyone in with --open")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"host": "no such host", "public": True}, "--host must be an address of this machine"),
        ({"host": "203.0.113.7", "public": True}, "--host must be an address of this machine"),
        ({"host": "::"}, "--host :: can be reached from other machines"),
        ({"port": 70_000}, "--port must be from 0"),
        ({"workers": 0}, "--workers must be from 1"),
        ({"limits": Limits(batch=0)}, "--batch must be from 1"),
        ({"token": "short"}, "a token must have at least 16"),
        ({"token": "sixteen or more, with spaces"}, "no space"),
    ],
)
def test_wrong_settings_are_refused(run: Path, fields: dict[str, Any], part: str) -> None:
    with pytest.raises(reslab.CallError) as error:
        serve(Settings(run, **fields))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_one_line(cli: Callable[..., subprocess.CompletedProcess[str]], run: Path, server: Server) -> None:
    one_line(cli("serve", run, "--port", str(server.port)), 1, f"127.0.0.1:{server.port} is in use")
    one_line(cli("serve", run, "--port", str(server.port), "--workers", "2"), 1, "is in use")


def test_two_servers_that_are_not_ready_yet_do_not_get_one_port(run: Path) -> None:
    with _bind(Settings(run, port=0)) as alone:
        settings = Settings(run, port=alone.getsockname()[1])
        with pytest.raises(reslab.WorkError, match="is in use"):
            _bind(settings)
    first, second = (_bind(settings, shared=True) for _ in range(2))  # as those of several workers
    with first, second, _claim(settings, first), pytest.raises(reslab.WorkError, match="is in use"):
        _claim(settings, second)
    with _bind(settings) as again:
        _claim(settings, again).close()


def test_the_missing_extra_is_named(run: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nfrom reslab.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "serve", str(run)], capture_output=True, text=True, timeout=100)
    one_line(done, 1, "pip install 'reslab[serve]'")


def test_a_token_may_come_from_the_environment_and_guards_any_address(run: Path) -> None:
    token = "0123456789abcdef"
    with serving(run, "--host", "127.0.0.1", RESLAB_TOKEN=token) as server:
        assert server.ask("GET", "/model")[0] == 401
        assert server.ask("POST", "/predict", LARGE, Connection="close")[0] == 401, "also to who reads nothing before all is sent"
        assert server.ask("GET", "/model", Authorization=f"Bearer {token}", Host="elsewhere.example")[0] == 200
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert token.encode() not in command


def test_half_a_request_holds_nobody_up_and_leaves_nothing_behind(server: Server) -> None:
    held = []
    for part in (b"", b"POST /predict HT", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"):
        for _ in range(20):
            held.append(socket.create_connection(("127.0.0.1", server.port)))
            held[-1].sendall(part)
    start = time.perf_counter()
    assert server.predict(image())[0] == 200
    assert time.perf_counter() - start < 30
    for each in held:
        each.close()
    deadline = time.monotonic() + 10
    while server.metric("body_bytes") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("body_bytes") == 0


def test_a_body_beyond_the_limit_is_answered_before_it_was_read(server: Server) -> None:
    before = server.resident()
    for _ in range(3):
        status, _, body = server.predict(bytes(100 << 20))
        assert (status, as_json(body)["status"]) == (413, 413)
    assert server.resident() - before < 40, "of 300 MiB nothing is kept"


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/predict", {"Content_Type": "text/html"}, 415),
        ("/predict?heat_map=maybe", {}, 400),
        ("/nowhere", {}, 404),
        ("/model", {}, 405),
        ("/predict", {"Host": "elsewhere.example"}, 421),
    ],
)
def test_a_refusal_is_seen_by_who_sends_a_whole_body_first(
    server: Server, monkeypatch: pytest.MonkeyPatch, version: int, path: str, headers: dict[str, str], status: int
) -> None:
    """The connection ends with the answer: closed before the body was taken, it would be reset."""
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn", version)
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", f"HTTP/{version / 10}")
    answer = server.ask("POST", path, LARGE, Connection="close", **headers)
    assert (answer[0], as_json(answer[2])["status"]) == (status, status)


def test_a_request_has_one_host(server: Server) -> None:
    for lines, status in (
        (b"HTTP/1.1\r\n", b"400"),
        (b"HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\n", b"400"),
        (b"HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n", b"400"),
        (b"HTTP/1.1\r\nHost: localhost\r\n", b"200"),
        (b"HTTP/1.0\r\n", b"200"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"GET /model " + lines + b"\r\n")
            assert connection.recv(4096)[9:12] == status, lines


def test_broken_http_is_refused_and_the_log_stays_empty(run: Path) -> None:
    with serving(run) as server:
        for request in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(request)
                assert connection.recv(4096)[:12] in (b"HTTP/1.1 400", b"")
        assert server.predict(b"secret pixels")[0] == 422
        assert server.predict(image())[0] == 200
        assert server.stop() == 0
        assert server.process.stderr and server.process.stderr.read() == ""


def test_an_endless_head_is_cut_off(server: Server) -> None:
    for endless in (b"x-%d: y\r\n" % 7, b"y"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(64):
                    connection.sendall(endless * (1 << 16))
                    time.sleep(0.002)
                pytest.fail("4 MiB of a head were taken")
    assert len(large := image(size=(500, 400))) > HEAD_BYTES
    assert server.predict(large)[0] == 200, "a body may be longer"


class Own(SimpleNamespace):
    """Equal to nothing but itself, as connections and requests are."""

    __hash__, __eq__ = object.__hash__, object.__eq__


def test_connections_that_only_hold_a_place_are_dropped_and_others_are_not() -> None:
    """As the clock goes on; a slow body has a limit of its own."""

    def connection(cycle: Any) -> Any:
        dropped: list[bool] = []
        transport = SimpleNamespace(abort=lambda: dropped.append(True), unsent=0)
        transport.get_write_buffer_size = lambda: transport.unsent
        return Own(cycle=cycle, dropped=dropped, transport=transport, flow=SimpleNamespace(write_paused=False))

    done, busy = (lambda: Own(response_complete=True)), Own(response_complete=False)
    silent, idle, working, active = connection(None), connection(done()), connection(busy), connection(done())
    slow, deaf = connection(done()), connection(busy)  # one reads its answer bit by bit, one reads nothing of what fills the buffer
    slow.transport.unsent, deaf.transport.unsent, deaf.flow.write_paused = 100, 1 << 16, True
    server = _Server(uvicorn.Config(app="none"), SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    server.server_state.connections.update((silent, idle, working, active, slow, deaf))
    for second in range(0, 25):
        server._drop_stale(float(second))
        active.cycle = done()  # it asks again each second
        slow.transport.unsent -= 1
    assert [bool(each.dropped) for each in (silent, idle, working, active, slow, deaf)] == [True, True, False, False, False, True]


def test_a_stop_waits_as_long_as_a_request_may_take_but_not_for_who_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    service: Any = SimpleNamespace(app="none", limits=Limits(seconds=3000.5))
    assert (_config(service).timeout_graceful_shutdown or 0) > BODY_SECONDS + 3000.5
    monkeypatch.setattr(server_module, "STALE_SECONDS", -1.0)
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 0.0)

    async def main() -> None:
        dropped = asyncio.Event()
        server = _Server(uvicorn.Config(app="none"), service, lambda: None)
        server.servers = []
        deaf = Own(cycle=None, transport=SimpleNamespace(abort=dropped.set, get_write_buffer_size=lambda: 1))
        with monkeypatch.context() as patched:
            patched.setattr(server.server_state, "connections", [deaf])
            patched.setattr(uvicorn.Server, "shutdown", lambda self, sockets: dropped.wait())
            await asyncio.wait_for(server.shutdown(), 10)

    asyncio.run(main())


class Client(threading.Thread):
    """Asks over and over, on one connection or a new one each time, until nobody listens any more."""

    def __init__(self, port: int, keep: bool) -> None:
        super().__init__(daemon=True)
        self.port, self.keep = port, keep
        self.answers: Counter[int] = Counter()
        self.lost: list[str] = []  # on connections that had been answered before
        self.turned_away = 0  # on new ones, of which the server may never have known
        self.body = image()

    def run(self) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # refused: it was not accepted
            self.use(connection)
            connection.close()

    def use(self, connection: http.client.HTTPConnection) -> None:
        for i in range(1_000 if self.keep else 1):
            try:
                connection.request("POST", "/predict", self.body, {"Content-Type": "image/png"})
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                if i:
                    self.lost.append(repr(error))
                else:
                    self.turned_away += 1
                return
            self.answers[answer.status] += 1
            if answer.will_close:
                return


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_answers_every_request_that_was_accepted(run: Path, workers: int) -> None:
    with serving(run, "--workers", str(workers)) as server:
        clients = [Client(server.port, keep=i < 12) for i in range(16)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 60
        while sum(sum(client.answers.values()) for client in clients) <= 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        status = server.stop()
        for client in clients:
            client.join(30)
        assert status == 0
        assert [client.lost for client in clients] == [[]] * 16, "a connection in use ends with an answer that says so"
        assert sum(sum(client.answers.values()) for client in clients) > 100
        assert {status for client in clients for status in client.answers} <= {200, 503}
        # A connection that the system took, and the worker had not yet, is reset when it stops listening.
        assert all(client.turned_away <= workers for client in clients)
        assert server.process.stderr and server.process.stderr.read() == ""


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_what_dies_later_is_replaced_and_nothing_starts_after_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "RETRY_SECONDS", 0.0)
    started: list[int] = []
    workers = workers_module._Workers(lambda row, pipe: None)
    dead: Any = SimpleNamespace(pid=1, exitcode=-9, terminate=lambda: None)
    workers.processes, workers.pipes = {0: dead}, {0: SimpleNamespace()}  # type: ignore[dict-item]
    with pytest.raises(reslab.WorkError, match="every worker process must start"):
        workers._bury(0, dead)
    workers.announced, workers.processes = True, {0: dead}
    with monkeypatch.context() as patched:
        patched.setattr(workers, "start", started.append)
        workers._bury(0, dead)
    assert (started, workers.pipes) == ([0], {})
    workers.processes = {1: SimpleNamespace(pid=None)}  # type: ignore[dict-item]  # just being started
    workers.stop()
    workers.start(2)
    assert list(workers.processes) == [1]


def test_a_worker_that_dies_is_replaced_and_the_counts_go_on(run: Path) -> None:
    with serving(run, "--workers", "2") as server:
        for i in range(20):
            assert server.predict(image(i))[0] == 200
        assert server.metric("images_total") == 20, "whichever worker is asked answers for both"
        first, second = children(server.process.pid)
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (first in children(server.process.pid) or len(children(server.process.pid)) < 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert second in children(server.process.pid)
        assert server.predict(image())[0] == 200
        assert server.metric("images_total") == 21
        assert server.stop() == 0
        assert server.process.stderr and "is replaced" in server.process.stderr.read()
