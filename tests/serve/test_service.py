"""The HTTP interface in this process: answers, refusals, limits, and who may ask."""

import asyncio
import base64
import io
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import reslab
from reslab.serve import service as service_module
from reslab.serve.metrics import Metrics, shared_rows
from reslab.serve.server import _published
from reslab.serve.service import Limits, Service
from reslab.serve.uploads import Memory
from reslab.use import explain
from reslab.use.classifier import Prediction
from tests.data.test_decode import bomb
from tests.serve.serving import CANVAS, CLASSES, SIZE, image, make_run, multipart

TOKEN = "correct horse battery".replace(" ", "-")
PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


def make(run: Path, limits: Limits | None = None, token: str | None = None, local_only: bool = True, classifier: Any = None) -> Service:
    return Service(classifier or reslab.load(run), _published(run), limits or Limits(body=1 << 20), Metrics(shared_rows(1)), token, local_only)


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with TestClient(make(run).app, base_url="http://localhost") as client:
        yield client


def refused(answer: Any, status: int, part: str = "") -> dict[str, Any]:
    """The problem document of an answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert set(problem) >= {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert part in problem["detail"], problem["detail"]
    assert "\n" not in problem["detail"]
    return problem


def test_an_image_gets_the_classes_that_predict_gives(client: TestClient, run: Path) -> None:
    classifier = reslab.load(run)
    body = image(1)
    (expected,) = classifier.predict_pixels([classifier.decode(body)])
    for headers in (PNG, {"content-type": "application/octet-stream"}, {"content-type": "image/jpeg; q=1"}):
        answer = client.post("/predict", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["predictions"]
        assert (found["label"], found["name"]) == (expected.label, None)
        assert found["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert [(row["label"], pytest.approx(row["probability"], abs=1e-6)) for row in found["top"]] == expected.top
        assert found["sure"] == (expected.probability >= 0.6)


def test_several_images_are_answered_in_order_with_their_names(client: TestClient) -> None:
    bodies = [image(i) for i in range(9)]
    form, kind = multipart(*((f"Füchse {i}.png", body) for i, body in enumerate(bodies)))
    together = client.post("/predict", content=form, headers={"content-type": kind}).json()["predictions"]
    alone = [client.post("/predict", content=body, headers=PNG).json()["predictions"][0] for body in bodies]
    assert [row["name"] for row in together] == [f"Füchse {i}.png" for i in range(9)]
    assert [row["label"] for row in together] == [row["label"] for row in alone]
    assert np.allclose([row["probability"] for row in together], [row["probability"] for row in alone], atol=1e-5)
    assert len({round(row["probability"], 3) for row in alone}) > 3, "the images must differ for the order to be seen"


def test_a_heat_map_is_a_grey_png_of_what_the_net_saw(client: TestClient) -> None:
    answer = client.post("/predict?heat_map=true", content=image(1), headers=PNG).json()["predictions"][0]
    assert "heat_map" not in client.post("/predict?heat_map=false", content=image(1), headers=PNG).json()["predictions"][0]
    prefix, _, data = answer["heat_map"].partition(",")
    assert prefix == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as heat:
        assert (heat.mode, heat.size) == ("L", (SIZE, SIZE))


def test_a_heat_map_is_of_the_label_whatever_the_net_says_in_fp32(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make(run)
    asked: list[str | None] = []
    monkeypatch.setattr(explain, "heat_map", lambda classifier, pixels, label=None: asked.append(label) or np.zeros(pixels.shape[:2], np.float32))
    label = service.classifier.classes[-1]
    side = service.classifier.preprocess.canvas
    service._draw([(Prediction(label, 0.5, [(label, 0.5)]), np.zeros((side, side, 3), np.uint8))])
    assert asked == [label]


def test_what_cannot_explain_itself_has_no_heat_map(run: Path) -> None:
    """As a model from an ONNX file: the same interface without a net."""
    held = reslab.load(run)

    class Exported:
        classes, preprocess, temperature, sure, spec = held.classes, held.preprocess, held.temperature, held.sure, held.spec
        decode, predict_pixels, has_net = held.decode, held.predict_pixels, False

    with TestClient(make(run, classifier=Exported()).app, base_url="http://localhost") as client:
        assert client.get("/model").json()["heat_map"] is False
        assert client.post("/predict", content=image(), headers=PNG).status_code == 200
        refused(client.post("/predict?heat_map=true", content=image(), headers=PNG), 422, "leave heat_map out")


FORM = {"content-type": "multipart/form-data; boundary=xyz"}
FIELD = b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n'


@pytest.mark.parametrize(
    ("body", "headers", "status", "part"),
    [
        (b"", PNG, 422, "empty file"),
        (b"no image", PNG, 422, "not an image"),
        (image()[:80], PNG, 422, "truncated"),
        (bomb(50_000, 50_000), PNG, 422, "megapixels"),
        (bomb(8_000, 8_000), PNG, 422, "8000 x 8000 px: the limit is 50 megapixels"),
        (b"x" * ((1 << 20) + 1), PNG, 413, "at most 1 MiB"),
        (image(), {"content-type": "text/html"}, 415, "received text/html"),
        (image(), {"content-type": "application/x-www-form-urlencoded"}, 415, "image/*"),
        (image(), {"content-type": "multipart/form-data"}, 400, "needs a boundary"),
        (image(), FORM, 400, "it stops before"),
        (multipart(("a.png", image()))[0][:-6], FORM, 400, "it stops before"),
        (b"--xyz\r\nno head\r\n--xyz--\r\n", FORM, 400, "blank line"),
        (b"--xyz--\r\n", FORM, 422, "received none"),
        (b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--xyz--\r\n', FORM, 422, "received none"),
        (multipart(*[("a.png", b"x")] * 33)[0], FORM, 422, "at most 32 images"),
        (FIELD * 257 + b"--xyz--\r\n", FORM, 422, "at most 256 parts"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(client: TestClient, body: bytes, headers: dict[str, str], status: int, part: str) -> None:
    refused(client.post("/predict", content=body, headers=headers), status, part)


def test_an_image_may_come_with_fields(client: TestClient) -> None:
    assert client.post("/predict", content=FIELD * 255 + multipart(("a.png", image()))[0], headers=FORM).status_code == 200


def test_one_bad_image_of_several_is_named(client: TestClient) -> None:
    form, kind = multipart(("a.png", image()), ("b.png", b"text"), ("../../c.png", b""))
    problem = refused(client.post("/predict", content=form, headers={"content-type": kind}), 422, "number 2 is not")
    assert problem["images"] == [
        {"index": 1, "name": "b.png", "detail": "not an image of a known format"},
        {"index": 2, "name": "../../c.png", "detail": "empty file (0 bytes)"},
    ]


def test_other_requests_are_problems_too(client: TestClient) -> None:
    refused(client.get("/nowhere"), 404, "/openapi.json lists what is")
    refused(client.get("/../../etc/passwd"), 404)
    refused(client.get("/predict/"), 404)
    assert refused(client.get("/predict"), 405) and client.get("/predict").headers["allow"] == "POST"
    refused(client.post("/predict?heat_map=maybe", content=image(), headers=PNG), 400, "received maybe")


def test_a_chunked_body_is_held_to_the_limit_too(client: TestClient) -> None:
    def chunks(n: int) -> Iterator[bytes]:
        yield image()
        yield from (b"\0" * 65536 for _ in range(n))

    assert client.post("/predict", content=chunks(2), headers=PNG).status_code == 200
    refused(client.post("/predict", content=chunks(20), headers=PNG), 413)


def test_mutated_bodies_are_answered_or_refused_and_never_fail(client: TestClient) -> None:
    rng = random.Random(0)
    seeds = [
        image(0),
        image(1, kind="JPEG"),
        image(2, kind="GIF"),
        image(3, kind="TIFF"),
        image(4, kind="WEBP"),
        multipart(("a", image(5)), ("b", image(6)))[0],
    ]
    seen = set()
    for i in range(300):
        seed = i % len(seeds)
        body = bytearray(seeds[seed])
        for _ in range(rng.choice((1, 2, 8, 64))):
            at = rng.randrange(len(body))
            body[at : at + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        body = body[: rng.choice((len(body), len(body), rng.randrange(len(body) + 1)))]
        answer = client.post("/predict", content=bytes(body), headers=FORM if seed == 5 else PNG)
        assert answer.status_code in (200, 400, 422), (i, answer.text)
        seen.add(answer.status_code)
    assert seen == {200, 400, 422}


class Slow:
    """A classifier that waits for `go` once it is set to."""

    def __init__(self, run: Path) -> None:
        self.held = reslab.load(run)
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)

    def predict_pixels(self, decoded: Any) -> Any:
        self.go.wait(20)
        return self.held.predict_pixels(decoded)


def test_more_than_the_queue_holds_is_503_and_what_takes_too_long_504(run: Path) -> None:
    slow = Slow(run)
    service = make(run, Limits(queue=3, batch=1, seconds=0.8), classifier=slow)

    async def main() -> None:
        transport = httpx2.ASGITransport(app=service.app)
        async with service.app.router.lifespan_context(service.app), httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            slow.go.clear()
            asked = [asyncio.create_task(client.post("/predict", content=image(i), headers=PNG)) for i in range(10)]
            answers = await asyncio.gather(*asked)
            statuses = sorted(answer.status_code for answer in answers)
            assert statuses == [503] * 6 + [504] * 4
            full = next(answer for answer in answers if answer.status_code == 503)
            refused(full, 503, "the queue is full")
            assert int(full.headers["retry-after"]) >= 1
            refused(next(answer for answer in answers if answer.status_code == 504), 504, "within 0.8 s")
            slow.go.set()
            again = await client.post("/predict", content=image(), headers=PNG)
            assert again.status_code == 200, "it recovers"

    asyncio.run(main())
    assert service.memory.held == 0


def test_what_a_client_asked_for_that_went_away_is_not_computed(run: Path) -> None:
    slow = Slow(run)
    service = make(run, Limits(batch=1), classifier=slow)
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [(b"host", b"localhost"), (b"content-type", b"image/png")]}

    async def ask(gone: asyncio.Event, sent: list[Any]) -> None:
        body = [{"type": "http.request", "body": image(), "more_body": False}]

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await service.app(scope, receive, send)

    async def main() -> None:
        async with service.app.router.lifespan_context(service.app):
            slow.go.clear()
            never, gone, answers = asyncio.Event(), asyncio.Event(), [list[Any]() for _ in range(4)]
            stays = [asyncio.create_task(ask(never, answers[i])) for i in (0, 1)]
            await asyncio.sleep(0.05)
            leaves = [asyncio.create_task(ask(gone, answers[i])) for i in (2, 3)]
            await asyncio.sleep(0.05)
            before = service.predictions.waiting
            gone.set()
            await asyncio.wait_for(asyncio.gather(*leaves), 5)
            assert service.predictions.waiting == before - 2
            slow.go.set()
            await asyncio.wait_for(asyncio.gather(*stays), 20)
            assert [answer[0]["status"] for answer in answers] == [200, 200, 400, 400]

    asyncio.run(main())
    assert service.memory.held == 0


def test_bodies_in_memory_are_bounded_over_all_requests(run: Path) -> None:
    service = make(run)
    service.memory = Memory(len(image()) - 1)
    with TestClient(service.app, base_url="http://localhost") as client:
        assert refused(client.post("/predict", content=image(), headers=PNG), 503, "as many bytes")
        assert service.memory.held == 0
        assert client.post("/predict", content=image(size=(3, 3)), headers=PNG).status_code == 200


def test_a_bug_is_a_problem_without_its_details(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make(run)
    with TestClient(service.app, base_url="http://localhost", raise_server_exceptions=False) as client:
        monkeypatch.setattr(service, "_row", lambda *_: 1 / 0)
        answer = client.post("/predict", content=image(), headers=PNG)
        problem = refused(answer, 500)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "division" not in json.dumps(problem)
        monkeypatch.undo()
        assert 'reslab_answers_total{status="500"} 1' in client.get("/metrics").text


def test_with_a_token_nothing_but_the_probes_answers_without_it(run: Path) -> None:
    with TestClient(make(run, token=TOKEN, local_only=False).app, base_url="http://example.org") as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        for path in ("/", "/page.js", "/model", "/metrics", "/openapi.json", "/report", "/nowhere"):
            refused(client.get(path), 401, "Bearer TOKEN")
        basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
        for given in (
            f"Bearer {TOKEN}x",
            "Bearer",
            f"Digest {TOKEN}",
            "Basic ???",
            "Bearer é",
            f"Basic {basic[:-4]}",
            "Basic " + base64.b64encode(b"x").decode(),
        ):
            refused(client.get("/model", headers={"authorization": given.encode("latin-1")}), 401)
        for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"):
            assert client.get("/model", headers={"authorization": given}).status_code == 200
            assert client.post("/predict", content=image(), headers={**PNG, "authorization": given}).status_code == 200
        assert "Basic" in client.get("/").headers["www-authenticate"], "so that a browser asks for it"


def test_without_a_token_only_loopback_names_are_answered(run: Path, client: TestClient) -> None:
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "127.1.2.3:9", "LOCALHOST"):
        assert client.get("/model", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "192.168.0.7:8000", ""):
        refused(client.get("/model", headers={"host": host}), 421, "localhost only")
    with TestClient(make(run, local_only=False).app, base_url="http://evil.example") as open_to_all:
        assert open_to_all.get("/model").status_code == 200


def test_model_says_what_it_is_and_how_good(client: TestClient) -> None:
    model = client.get("/model").json()
    assert (model["classes"], model["sure_from"], model["image_size"], model["canvas"]) == (list(CLASSES), 0.6, SIZE, CANVAS)
    assert (model["net"], model["data"], model["test"]["top1"], model["test"]["n"]) == ("resnet8", "colours", 0.9, 36)
    assert model["spec"]["block"] == "basic"


def test_a_model_without_its_run_is_served_without_a_report(run: Path) -> None:
    with TestClient(make(run / "model").app, base_url="http://localhost") as client:
        assert client.get("/model").json()["test"] is None
        refused(client.get("/report"), 404)
        assert "/report" not in client.get("/openapi.json").json()["paths"]


def test_openapi_lists_what_is_served(client: TestClient, run: Path) -> None:
    document = client.get("/openapi.json").json()
    assert {route.path for route in make(run).app.routes} - {"/page.css", "/page.js"} == set(document["paths"])
    for path, operations in document["paths"].items():
        assert (client.get(path).status_code == 200) == ("get" in operations), path


def test_metrics_count_what_happened(run: Path) -> None:
    rows = shared_rows(2)
    Metrics(rows, 1).add("images_total", 5)  # by another process
    service = make(run)
    service.metrics = Metrics(rows, 0)
    with TestClient(service.app, base_url="http://localhost") as client:
        client.post("/predict", content=multipart(("a", image()), ("b", image()))[0], headers=FORM)
        client.post("/predict?heat_map=true", content=image(), headers=PNG)
        client.post("/predict", content=b"x", headers=PNG)
        text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'reslab_\w+(\{\w+="[^"]+"\})? [0-9.]+', line) for line in lines)
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert values["reslab_images_total"] == "8", "3 good ones, and 5 elsewhere; a bad one is not classified"
    assert float(values["reslab_batch_images_sum"]) == 3
    assert values["reslab_heat_maps_total"] == "1"
    assert values["reslab_body_bytes"] == "0"
    assert values['reslab_batch_images_bucket{le="+Inf"}'] == values["reslab_batch_images_count"]


def test_the_page_and_the_report_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    page, report = client.get("/"), client.get("/report")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy
    assert not re.search(r"<style|style=|<script(?! src=)|\son\w+=|https?://(?!www\.w3\.org)", page.text)
    for name in ("/page.css", "/page.js"):
        assert "http" not in client.get(name).text
        assert client.get(name).headers["x-content-type-options"] == "nosniff"
    assert "the report" in report.text
    assert "script-src" not in report.headers["content-security-policy"]


def test_large_images_are_decoded_one_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "LARGE_PIXELS", 100)
    monkeypatch.setattr(service_module, "LARGE_BODY", 10)
    slow = Slow(run)
    inside, most, lock = 0, 0, threading.Lock()
    decode = slow.held.decode

    def watched(body: bytes) -> Any:
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        threading.Event().wait(0.01)
        with lock:
            inside -= 1
        return decode(body)

    slow.decode = watched  # type: ignore[attr-defined]
    with TestClient(make(run, classifier=slow).app, base_url="http://localhost") as client:
        form, kind = multipart(*((str(i), image(i)) for i in range(6)))
        assert client.post("/predict", content=form, headers={"content-type": kind}).status_code == 200
    assert most == 1


def test_answers_under_a_stop_ask_the_client_to_close(run: Path) -> None:
    service = make(run)
    with TestClient(service.app, base_url="http://localhost") as client:
        assert "connection" not in client.get("/model").headers
        service.closing = True
        assert client.get("/model").headers["connection"] == "close"
        refused(client.get("/ready"), 503)
        service.closing = False
