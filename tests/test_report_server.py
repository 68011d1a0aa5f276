"""The report's server answers its own page and nobody else's; typed text is traced as the recorder would."""

from __future__ import annotations

import http.client
import json
import re
import threading
import webbrowser

import pytest
import torch
import typer
from typer.testing import CliRunner

import moekit
from moekit import refmoe
from moekit.cli import view as verb
from moekit.errors import DataError, OutputError
from moekit.recording import trace as record
from moekit.recording.live import MOST_TOKENS, LiveTracer
from moekit.report import collect
from moekit.report.server import BODY_BYTES, TEXT_CHARACTERS, ReportServer
from synthetic import synthetic_trace


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    return collect(synthetic_trace(tmp_path_factory.mktemp("trace") / "t"))


@pytest.fixture(scope="module")
def server(payload):
    def trace_text(text):
        if text == "bad":
            raise DataError("this text cannot be traced", got="nothing")
        if text == "bug":
            raise ZeroDivisionError("our mistake")
        return {"tokens": [text], "ids": [], "weights": [], "margin": [], "seconds": 0}

    with ReportServer(payload, trace_text) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(server, method="POST", path="/trace", body=None, **headers):
    """Status, headers and body of an answer; the request is a good one but for what is given."""
    port = server.server_address[1]
    content = json.dumps({"text": "hello"}) if body is None else body
    usual = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    sent = {name: value for name, value in (usual | headers).items() if value is not None}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        connection.putheader(name, value)
    if method == "POST" and "Content-Length" not in sent:
        connection.putheader("Content-Length", str(len(content)))
    connection.endheaders(content.encode() if method == "POST" else None)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_page_and_its_numbers_are_served(server, payload):
    status, headers, body = ask(server, "GET", "/")
    assert status == 200
    assert b"<!doctype html>" in body
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, _, body = ask(server, "GET", "/report.json")
    assert status == 200
    assert json.loads(body)["domains"] == payload["domains"]
    for path in ("/other", "/../pyproject.toml", "/report.json/"):
        assert ask(server, "GET", path)[0] == 404


def test_the_page_may_ask(server):
    status, _, body = ask(server)
    assert status == 200
    assert json.loads(body)["tokens"] == ["hello"]
    port = server.server_address[1]
    local = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert ask(server, **local)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Host": "[", "Origin": "http://["}, 403),
        ({"Host": None}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Length": "many"}, 411),
        ({"Content-Length": "-1"}, 411),
        ({"Content-Length": str(BODY_BYTES + 1)}, 413),
    ],
)
def test_others_may_not(server, headers, status):
    assert ask(server, **headers)[0] == status


def test_a_rebound_name_cannot_read_the_page(server):
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "GET", "/report.json", Host=f"evil.example:{server.server_address[1]}")[0] == 403


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '"text"', "{}", '{"text": 1}', json.dumps({"text": "x" * (TEXT_CHARACTERS + 1)})]
)
def test_what_is_no_question_is_refused(server, body):
    status, _, answer = ask(server, body=body)
    assert status == 400
    assert json.loads(answer)["error"]


def test_a_users_mistake_is_told(server):
    status, _, body = ask(server, body=json.dumps({"text": "bad"}))
    assert status == 400
    assert "cannot be traced" in json.loads(body)["error"]
    assert ask(server, path="/other")[0] == 404


def test_our_own_mistake_is_told_and_survived(server):
    status, _, body = ask(server, body=json.dumps({"text": "bug"}))
    assert status == 500
    assert "ZeroDivisionError" in json.loads(body)["error"]
    assert ask(server)[0] == 200


def interrupted(_server):
    raise KeyboardInterrupt


def run(tmp_path, monkeypatch, *arguments):
    """Output of `moekit view`, interrupted at once, and the addresses that the browser was sent to."""
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(ReportServer, "serve_forever", interrupted)
    trace = synthetic_trace(tmp_path / "t")
    app = typer.Typer()
    app.command()(verb.view)
    result = CliRunner().invoke(app, [str(trace.path), "--port", "0", *arguments])
    if result.exception:
        raise result.exception
    return result.output, opened


def test_the_verb_opens_the_browser(tmp_path, monkeypatch):
    output, opened = run(tmp_path, monkeypatch)
    assert re.search(r"http://127\.0\.0\.1:\d+/", output)[0] == opened[0]
    assert "no password" not in output


def test_the_verb_warns_when_others_can_reach_it(tmp_path, monkeypatch):
    output, opened = run(tmp_path, monkeypatch, "--host", "0.0.0.0", "--no-browser")
    assert "no password" in output
    assert opened == []


def test_the_verb_refuses_another_model(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="another model"):
        run(tmp_path, monkeypatch, "refmoe")


def test_without_a_model_there_is_no_question(payload):
    with ReportServer(payload) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        assert "connect-src" not in ask(running, "GET", "/")[1]["Content-Security-Policy"]
        assert ask(running)[0] == 404
        with pytest.raises(OutputError, match="cannot listen"):
            ReportServer(payload, port=running.server_address[1])
        running.shutdown()


def test_typed_text_is_traced_as_it_is_recorded(tmp_path):
    model = moekit.open("refmoe")
    file = tmp_path / "text.txt"
    file.write_text(refmoe.texts()["python"].read_text("utf-8")[:600])
    data = moekit.load_data(model, {"python": file}, tokens=None, sequence_length=64)
    recorded = record(model, data, out=tmp_path / "t", tokens=True, dtype=torch.float32)
    tracer = LiveTracer(model, dtype=torch.float32)
    text = file.read_text("utf-8")
    answer = tracer(text)
    columns = recorded.tokens()
    first = int((columns["sequence"] == 0).sum())
    assert answer["tokens"][:first] == recorded.text(columns["id"][:first])
    assert "".join(answer["tokens"]) == text
    for i, index in enumerate(recorded.layers):
        layer = recorded.layer(index)
        assert answer["ids"][i][:first] == layer.ids[:first].tolist()
        assert torch.tensor(answer["weights"][i][:first]).numpy() == pytest.approx(layer.weights[:first], abs=1e-3)
        assert torch.tensor(answer["margin"][i][:first]).numpy() == pytest.approx(layer.margin[:first], abs=1e-3)
    json.dumps(answer, allow_nan=False)
    with pytest.raises(DataError, match="cannot be traced"):
        tracer("")
    with pytest.raises(DataError, match="cannot be traced"):
        tracer("one two " * MOST_TOKENS)
