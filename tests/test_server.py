"""The server as its clients see it: the official client, curl, many at once, and some that go away or ask nonsense."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import moekit
from moekit import refmoe
from moekit.cli import main
from moekit.data import load_tokenizer
from moekit.plans import Plan, Steer
from moekit.serve.batching import Batcher
from moekit.serve.engine import Engine
from moekit.serve.http.app import create_app
from moekit.serve.http.calls import Service
from moekit.serve.packing import pack
from moekit.serve.scheduler import Scheduler
from moekit.serve.steering import Steering
from moekit.serve.trial import why_not
from moekit.view import MoEView

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY = "sk-test"
NO_END = {"0": -100}  # refmoe's end of text


class Running:
    """A server in a thread."""

    def __init__(self, store, api_key=None, max_body_bytes=100_000, plans=None):
        self.engine = Engine(store, context=512, texts=16, kept_tokens=16 * 512)
        self.tokenizer = load_tokenizer(store)
        steering = Steering(MoEView(self.engine.model, self.engine.layout), plans) if plans else None
        self.why_not = why_not(self.engine)
        self.scheduler = Scheduler(Batcher(self.engine, self.tokenizer, steering, self.why_not is None))
        service = Service(self.scheduler, self.tokenizer, "refmoe", 1, TEMPLATE, self.why_not)
        app = create_app(service, api_key, max_body_bytes)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.scheduler.close(grace_s=0)
        self.engine.close()

    def client(self, key=KEY):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def get(self, path, method="GET", body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **dict(headers)})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def post(self, path, **body):
        status, text = self.get(path, "POST", json.dumps(body), {"Content-Type": "application/json"})
        return status, json.loads(text)

    def quiet(self, seconds=10.0):
        """Whether nothing runs before long."""
        deadline = time.monotonic() + seconds
        while self.scheduler.running + self.scheduler.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.scheduler.running + self.scheduler.waiting == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return pack(moekit.open("refmoe"), tmp_path_factory.mktemp("server") / "store")


@pytest.fixture(scope="module")
def served(store):
    model = moekit.open("refmoe")
    bans = [Steer(layer=x.index, expert=e, action="ban") for x in model.layout.routed for e in range(28)]
    running = Running(store, KEY, plans={"few": Plan(layout_hash=model.layout.hash, ops=bans)})
    yield running
    running.close()


def complete(served, prompt, **more):
    given = {"max_tokens": 12, "temperature": 0, **more}
    return served.client().completions.create(model="refmoe", prompt=prompt, **given)


def test_a_completion_is_what_run_writes(served, store, capsys):
    assert main(["run", str(store), "--prompt", "import os", "--max-tokens", "12"]) == 0
    expected = capsys.readouterr().out.rstrip("\n")
    answer = complete(served, "import os")
    assert answer.choices[0].text.rstrip("\n") == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(served.tokenizer("import os").input_ids)
    ids = served.tokenizer("import os").input_ids
    assert complete(served, ids).choices[0].text == answer.choices[0].text
    several = complete(served, ["import os", "In the beginning"])
    assert [x.index for x in several.choices] == [0, 1]
    assert several.choices[0].text == answer.choices[0].text


def test_a_talk_goes_through_the_template(served):
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    settings = {"model": "refmoe", "messages": talk, "max_tokens": 10, "temperature": 0}
    answer = served.client().chat.completions.create(**settings)
    written = complete(served, "system: Be brief.\nuser: Hello\nassistant:", max_tokens=10)
    assert answer.choices[0].message.content == written.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    parts = [*talk[:1], {"role": "user", "content": [{"type": "text", "text": x} for x in ("Hel", "lo")]}]
    again = served.client().chat.completions.create(**{**settings, "messages": parts})
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_streams_say_what_answers_say(served):
    client = served.client()
    talk = [{"role": "user", "content": "Hello"}]
    settings = {"model": "refmoe", "messages": talk, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(x.choices[0].delta.content or "" for x in chunks if x.choices)
    assert text == whole.choices[0].message.content
    assert [x.choices[0].finish_reason for x in chunks if x.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({x.id for x in chunks}) == 1
    parts = list(complete(served, "import os", stream=True, n=2, seed=1, temperature=1.0))
    both = complete(served, "import os", n=2, seed=1, temperature=1.0)
    for index in (0, 1):
        text = "".join(x.choices[0].text for x in parts if x.choices[0].index == index)
        assert text == both.choices[index].text
    assert both.choices[0].text != both.choices[1].text
    assert both.usage.completion_tokens == 24


def test_a_stream_is_events_with_an_end(served):
    body = {"model": "refmoe", "prompt": "import os", "stream": True, "max_tokens": 3, "temperature": 0}
    status, text = served.get("/v1/completions", "POST", json.dumps(body), {"Content-Type": "application/json"})
    assert status == 200
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(x.startswith("data: {") for x in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_are_not_shown(served, stream):
    whole = complete(served, "import os", max_tokens=24).choices[0].text
    stop = whole[9:14]  # over the borders of tokens
    answer = complete(served, "import os", max_tokens=24, stop=[stop, "never"], stream=stream)
    choices = [x.choices[0] for x in answer] if stream else [answer.choices[0]]
    assert "".join(x.text for x in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"


def test_seeds_and_temperature(served):
    def draw(**more):
        return complete(served, "import os", temperature=1.0, **more).choices[0].text

    assert draw(seed=7) == draw(seed=7) != draw(seed=8)
    assert draw(seed=7, top_p=1e-6) == complete(served, "import os").choices[0].text
    banned = served.tokenizer(complete(served, "import os", max_tokens=1).choices[0].text).input_ids[-1]
    other = complete(served, "import os", logit_bias={str(banned): -100})
    assert other.choices[0].text != complete(served, "import os").choices[0].text
    assert complete(served, "x", frequency_penalty=2, presence_penalty=2).choices[0].text != ""


def test_likelihoods_are_told(served):
    import math

    import torch

    answer = complete(served, "import os", max_tokens=4, logprobs=3)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(4)]
    for word, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[word] == max(top.values()) == logprob
    stock = moekit.open("refmoe").load(torch.bfloat16)
    ids = served.tokenizer("import os", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = stock(ids).logits[0, -1].float().log_softmax(-1).max().item()
    assert math.isclose(found.token_logprobs[0], expected, abs_tol=0.05)
    talk = served.client().chat.completions.create(
        model="refmoe", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = talk.choices[0].logprobs.content
    assert len(content) == 4
    assert all(len(x.top_logprobs) == 2 and x.logprob <= 0 for x in content)
    assert complete(served, "import os").choices[0].logprobs is None


def test_models_are_listed(served):
    (card,) = served.client().models.list().data
    assert (card.id, card.owned_by, card.max_model_len, card.steer) == ("refmoe", "moekit", 512, ["few"])
    assert served.client().models.retrieve("refmoe").id == "refmoe"


def test_a_plan_steers_only_who_asks_for_it(served):
    plain = complete(served, "import os").choices[0].text
    with ThreadPoolExecutor(6) as pool:
        names = [None, "few"] * 3
        jobs = [pool.submit(complete, served, "import os", extra_body={"steer": name}) for name in names]
        texts = [job.result().choices[0].text for job in jobs]
    assert texts[::2] == [plain] * 3
    assert len(set(texts[1::2])) == 1
    assert texts[1] != plain
    assert complete(served, "import os").choices[0].text == plain
    with pytest.raises(openai.BadRequestError, match="did you mean 'few'"):
        complete(served, "import os", extra_body={"steer": "fewer"})


def test_sixteen_clients_get_what_they_get_alone(served):
    texts = [path.read_text("utf-8") for path in refmoe.texts().values()]
    prompts = [texts[i % 6][100 * i : 100 * i + 10 + 9 * i] for i in range(16)]
    settings = {"max_tokens": 16, "logit_bias": NO_END}
    expected = [complete(served, prompt, **settings).choices[0].text for prompt in prompts]
    before = Counter(served.engine.telemetry.forwards)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: complete(served, prompt, **settings), prompts))
    same = sum(x.choices[0].text == y for x, y in zip(answers, expected, strict=True))
    assert same >= 15  # in bfloat16 a near tie may fall the other way
    assert [x.usage.completion_tokens for x in answers] == [16] * 16
    assert (served.engine.telemetry.forwards - before)["decode"] < 16 * 15 / 2  # they shared forwards
    assert served.quiet()


def test_who_goes_away_frees_the_place(served):
    finished = served.engine.telemetry.finished
    before = finished["cancelled"]
    stream = complete(served, "import os", max_tokens=450, stream=True, logit_bias=NO_END)
    next(iter(stream))
    assert served.scheduler.running == 1
    stream.close()
    assert served.quiet(2)
    body = json.dumps({"model": "refmoe", "prompt": "import os", "max_tokens": 450, "logit_bias": NO_END})
    raw = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    raw.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    deadline = time.monotonic() + 10
    while not served.scheduler.running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert served.scheduler.running == 1
    raw.close()
    assert served.quiet(2)
    assert finished["cancelled"] == before + 2
    assert complete(served, "import os").usage.completion_tokens == 12


def test_more_than_may_wait_are_sent_away(served, monkeypatch):
    monkeypatch.setattr(served.scheduler, "queue", 0)
    monkeypatch.setattr(served.engine, "texts", 1)
    stream = complete(served, "import os", max_tokens=450, stream=True, logit_bias=NO_END)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="too many requests") as caught:
        complete(served, "import os")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    stream.close()
    assert served.quiet()
    assert complete(served, "import os").usage.completion_tokens == 12


def test_the_key_is_wanted(served):
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").models.list()
    assert served.get("/metrics", headers={"Authorization": ""})[0] == 401
    assert served.get("/health", headers={"Authorization": ""})[0] == 200


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        (TEXT, {"prompt": "x", "model": "other"}, 404, "model", "no model 'other'"),
        (TEXT, {"prompt": "x" * 5000}, 400, None, "1 to 511 tokens"),
        (TEXT, {"prompt": "a7 " * 30_000}, 400, None, "more than"),
        (TEXT, {"prompt": ""}, 400, None, "1 to 511 tokens"),
        (TEXT, {"prompt": []}, 400, "prompt", "no prompt"),
        (TEXT, {"prompt": [4096000]}, 400, None, "no such token"),
        (TEXT, {"prompt": "x" * 100_001}, 413, None, "100,000 bytes"),
        (TEXT, {"prompt": "x", "temperature": 3}, 400, "temperature", "less than or equal to 2"),
        (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        (TEXT, {"prompt": "x", "stop": ["a"] * 17}, 400, None, "at most 16"),
        (TEXT, {"prompt": "x", "logit_bias": {"1": 101}}, 400, None, "-100 to 100"),
        (TEXT, {"prompt": "x", "echo": True}, 400, "echo", "False"),
        (TEXT, {}, 400, "prompt", "required"),
        (CHAT, {"messages": []}, 400, "messages", "at least 1"),
        (CHAT, {"messages": HI, "tools": []}, 400, "tools", "not supported"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format", "text"),
        (CHAT, {"messages": HI, "top_logprobs": 2}, 400, None, "needs logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text"),
        ("/v1/embeddings", {}, 404, None, "Not Found"),
    ],
)
def test_mistakes_are_told_in_openais_shape(served, path, body, status, param, message):
    found, answer = served.post(path, **{"model": "refmoe", **body})
    assert (found, answer["error"]["param"]) == (status, param)
    assert message in answer["error"]["message"]
    assert answer["error"]["type"]


def test_what_is_no_json_or_has_no_length(served):
    assert served.get(TEXT, "POST", "{", {"Content-Type": "application/json"})[0] == 400
    assert served.get(TEXT, "GET")[0] == 405
    chunks = (b"x" * 1000 for _ in range(200))  # sent without a length
    assert served.get(TEXT, "POST", chunks, {"Content-Type": "application/json"})[0] == 413
    accepted = {"user": "me", "metadata": {}, "stop": None, "prompt": "x", "max_tokens": 1}
    assert served.post(TEXT, model="refmoe", **accepted)[0] == 200


def test_metrics_are_those_of_the_work(served):
    def read():
        text = served.get("/metrics")[1]
        return {
            (x.name, *sorted(x.labels.values())): x.value
            for family in text_string_to_metric_families(text)
            for x in family.samples
        }

    before = read()
    complete(served, "import os", max_tokens=5, logit_bias=NO_END)
    after = read()
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    assert grown["moekit_tokens_total", "prefill"] == len(served.tokenizer("import os").input_ids)
    assert grown["moekit_tokens_total", "decode"] == 4  # the fifth is not run
    assert grown["moekit_requests_total", "length"] == 1
    assert grown["moekit_time_to_first_token_seconds_count",] == 1
    assert grown["moekit_time_per_token_seconds_count",] == 4
    layers = [x.index for x in served.engine.layout.routed]
    used = [grown["moekit_expert_hits_total", str(x)] + grown["moekit_expert_misses_total", str(x)] for x in layers]
    assert min(used[1:]) >= 4 * 4
    assert after["moekit_requests_running",] == after["moekit_requests_waiting",] == 0
    assert 0 < after["moekit_time_per_token_seconds", "0.5"] <= after["moekit_time_per_token_seconds", "0.99"]
    served.post(TEXT, model="other", prompt="x")
    assert read()["moekit_errors_total", "404"] == after.get(("moekit_errors_total", "404"), 0) + 1


def test_a_damaged_expert_fails_only_who_needs_it(store, tmp_path):
    """Two texts side by side; the record of an expert that only one of them chooses is spoilt."""
    shutil.copytree(store, tmp_path / "store")
    served = Running(tmp_path / "store")
    engine, used, prompts = served.engine, [], ["And God said unto", "12 + 35 ="]
    stock = engine.cache.run
    engine.cache.run = lambda layer, experts, *rest: (
        used[-1].update((layer, x) for x in experts),
        stock(layer, experts, *rest),
    )[1]
    for prompt in prompts:
        used.append(set())
        list(engine.stream(served.tokenizer(prompt).input_ids, 24))
    layer, expert = sorted(used[1] - used[0])[-1]
    stored = engine.store.layers[layer]
    with (tmp_path / "store" / stored.file).open("r+b") as file:
        file.seek(stored.offsets[expert] + 200)
        byte = file.read(1)
        file.seek(stored.offsets[expert] + 200)
        file.write(bytes([byte[0] ^ 1]))
    engine.cache.close()
    engine.cache = engine._cache(engine.memory.experts, "lru", True)  # nothing is in memory any more
    try:
        with ThreadPoolExecutor(2) as pool:
            good = pool.submit(complete, served, prompts[0], max_tokens=24)
            bad = pool.submit(complete, served, prompts[1], max_tokens=24)
            assert good.result().usage.completion_tokens > 0
            with pytest.raises(openai.InternalServerError, match=f"layer {layer}, expert {expert}"):
                bad.result()
        with pytest.raises((openai.InternalServerError, openai.APIError), match="damaged"):
            list(complete(served, prompts[1], max_tokens=24, stream=True))
        assert complete(served, prompts[0], max_tokens=24).choices[0].text == good.result().choices[0].text
        assert json.loads(served.get("/health")[1])["status"] == "ok"
    finally:
        served.close()


@pytest.fixture(scope="module")
def command(store, tmp_path_factory):
    """`moekit serve` as a process, and the address that it says."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    words = [
        "serve",
        str(store),
        "--port",
        "0",
        "--chat-template",
        str(template),
        "--name",
        "small",
        "--memory",
        "2GiB",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "moekit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"serving (http://127\.0\.0\.1:\d+)/v1", line):
            break
    else:
        pytest.fail(f"the server did not start: {said}")
    yield process, found[1]
    process.kill()


def test_curl_talks_to_the_command(command):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    process, address = command

    def curl(path, *more):
        done = subprocess.run(
            ["curl", "-sS", "-w", "\n%{http_code}", *more, address + path],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.rpartition("\n")[::2]

    text, code = curl("/health")
    assert (code, json.loads(text)["model"]) == ("200", "small")
    body = json.dumps({"model": "small", "messages": HI, "max_tokens": 4, "temperature": 0})
    json_type = ("-H", "Content-Type: application/json")
    text, code = curl(CHAT, *json_type, "-d", body)
    assert code == "200"
    said = json.loads(text)["choices"][0]["message"]["content"]
    text, code = curl(CHAT, *json_type, "-N", "-d", body.replace("{", '{"stream": true, ', 1))
    chunks = [json.loads(x.removeprefix("data: ")) for x in text.split("\n\n") if x.startswith("data: {")]
    assert "".join(x["choices"][0]["delta"].get("content", "") for x in chunks) == said
    text, code = curl(TEXT, *json_type, "-d", "{")
    assert (code, json.loads(text)["error"]["code"]) == ("400", "invalid_json")
    assert "moekit_requests_total" in curl("/metrics")[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steer", "plan.json"], "a name of its own"),
        (["--steer", "x=nowhere.json"], "no such plan"),
        (["--chat-template", "nowhere.jinja"], "template cannot be read"),
        (["--max-body", "much"], "much"),
        (["--host", "300.1.1.1"], "cannot listen"),
        (["--memory", "100MB", "--port", "0"], "so little memory"),
    ],
)
def test_mistakes_of_the_command_are_told(store, capsys, arguments, message):
    assert main(["serve", str(store), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_port_in_use_is_told(store, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(store), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_a_plan_for_another_model_is_refused_at_the_start(store, tmp_path, capsys):
    plan = Plan(layout_hash="0", ops=[Steer(layer=0, expert=1, action="ban")]).save(tmp_path / "plan.json")
    assert main(["serve", str(store), "--port", "0", "--steer", f"x={plan}"]) == 2
    assert "another model" in capsys.readouterr().err
