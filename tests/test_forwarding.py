"A router in front of engines: ours plays the engine; others break off, refuse, or aren't there."
import json, socket, threading

import httpx, openai, pytest

from waiting import until
from model_glue_nb.mixing.forwarding import Engine, Forwarding
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.scheduler import Served
from model_glue_nb.mixing.server import ApiServer, LocalBackend, ServerRules
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import read_zoo

NAMES, HINTS = ("a-sort", "b-shift"), [["sort CAB =", "sort IUJRH ="], ["shift CAB =", "shift DEF ="]]
PROMPTS = [f"{skill} {x} =" for skill in ("sort", "shift") for x in ("BA", "IUJRH", "KLM")]

@pytest.fixture(scope="module")
def live(tmp_path_factory):
    spec = MixtureSpec(NAMES, dict(name="prompt", positive=HINTS))
    return mix(spec, read_zoo("demo"), tmp_path_factory.mktemp("mixture")/"glued").load("cpu")

@pytest.fixture(scope="module")
def engine(live):
    with ApiServer(LocalBackend(Served(live, "engine")), rules=ServerRules(token="s3cret")) as s: yield s

def front(live, *engines, **how): return ApiServer(Forwarding(Served(live, "glued"), list(engines), **how))

@pytest.fixture(scope="module")
def server(live, engine):
    with front(live, *(Engine(n, f"{engine.url}/v1", n, "s3cret") for n in NAMES)) as s: yield s

def client_of(server): return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as c: yield c

def test_answers_are_those_of_the_mixture(live, client):
    for prompt, want in zip(PROMPTS, live.generate(PROMPTS, 12)):
        got = client.completions.create(model="glued", prompt=prompt, max_tokens=12)
        assert (got.choices[0].text, got.model) == (want, "glued")
        assert got.route["expert"] == NAMES["shift" in prompt] and not got.route["forced"] and set(got.route["scores"]) == set(NAMES)
    forced = client.completions.create(model="b-shift", prompt="sort BA =", max_tokens=12)
    assert forced.route == dict(expert="b-shift", forced=True, scores={})
    assert forced.choices[0].text == live.expert(1).generate(["sort BA ="], 12)[0]

def test_a_chat_goes_where_its_last_question_belongs(live, client):
    talk = [dict(role="user", content="sort BA ="), dict(role="assistant", content="AB"), dict(role="user", content="shift KLM =")]
    got = client.chat.completions.create(model="glued", messages=talk, max_tokens=12)
    assert got.choices[0].message.content == "".join(live.chat(talk, 12)) and got.route["expert"] == "b-shift"

def test_streams_pass_through(live, client):
    *chunks, last = client.completions.create(model="glued", prompt="shift IUJRH =", max_tokens=12, stream=True,
                                              stream_options=dict(include_usage=True))
    assert "".join(c.choices[0].text for c in chunks) == live.generate(["shift IUJRH ="], 12)[0] and len(chunks) > 3
    assert {c.route["expert"] for c in [*chunks, last]} == {"b-shift"} and {c.model for c in chunks} == {"glued"}
    assert last.usage.completion_tokens == len(chunks) - 1, "a piece for each; the beginning has none, the end is a token too"

def test_tokens_are_counted(server, client):
    client.completions.create(model="a-sort", prompt="sort BA =", max_tokens=12)
    page = httpx.get(f"{server.url}/metrics").text
    assert 'model_glue_completion_tokens_total{expert="a-sort"}' in page and "model_glue_running 0" in page

def test_what_an_engine_says_of_a_request_keeps_its_status(client):
    with pytest.raises(openai.BadRequestError, match="Engine of 'a-sort': .*best_of"):
        client.completions.create(model="glued", prompt="sort BA =", extra_body=dict(best_of=2))
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError, match="Shorten it"):
            client.completions.create(model="glued", prompt="sort " + "A" * 100, stream=stream)

@pytest.mark.parametrize("body, said", [
    (dict(prompt=["a", "b"]), "expected one text"), (dict(prompt=" "), "is empty"), (dict(), "expected one text"),
    (dict(prompt="x", model="nobody"), "There is no model 'nobody'"), (dict(prompt="x", model=3), "'model' is missing"), (dict(prompt="x", stream="yes"), "stream")])
def test_what_no_router_can_read_is_refused_here(server, body, said):
    got = httpx.post(f"{server.url}/v1/completions", json=dict(model="glued") | body)
    assert got.status_code in (400, 404) and said in got.json()["error"]["message"]

@pytest.mark.parametrize("messages", [[], "hi", [3], [dict(role="user")], [dict(role="system", content="x")], [dict(role="user", content=[dict(type="image_url")])]])
def test_conversations_without_a_question_are_refused(server, messages):
    got = httpx.post(f"{server.url}/v1/chat/completions", json=dict(model="glued", messages=messages))
    assert got.status_code == 400 and got.json()["error"]["param"] == "messages"

class Odd:
    "An engine that answers everybody with the same bytes, then hangs up."
    def __init__(self, said):
        self.line, self.said = socket.create_server(("127.0.0.1", 0)), said
        self.url = f"http://127.0.0.1:{self.line.getsockname()[1]}/v1"
        threading.Thread(target=self.answer, daemon=True).start()
    def answer(self):
        while True:
            try: line, _ = self.line.accept()
            except OSError: return
            with line:
                line.recv(2**16)
                line.sendall(self.said)
    def __enter__(self): return self
    def __exit__(self, *_): self.line.close()

def http(body, status=200, kind="application/json", length=None):
    return f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {length or len(body)}\r\n\r\n{body}".encode()

PIECE = 'data: {"choices": [{"index": 0, "text": "A"}]}\n\n'
@pytest.mark.parametrize("said, why", [
    (http("not json"), "JSON object"), (http("[1]"), "JSON object"), (http('{"error": {"message": "it burns s3cret"}}'), "it burns …"),
    (http('{"error": {"message": "down"}}', 500), "down .status 500"), (http('{"error": {"message": "who?"}}', 404), "who. .status 404"),
    (http('{"error": {"message": "bad key s3cret"}}', 401), "refused our key"), (b"", "can't be reached"), (http("{", length=99), "can't be reached")])
def test_an_engine_that_fails_is_named(live, said, why):
    with Odd(said) as odd, front(live, *(Engine(n, odd.url, n, "s3cret") for n in NAMES)) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match=f"Engine of 'a-sort': .*{why}") as e:
            client.completions.create(model="glued", prompt="sort BA =")
        assert (e.value.status_code, e.value.code) == (502, "backend_error") and "s3cret" not in str(e.value)

@pytest.mark.parametrize("said", [http(PIECE, kind="text/event-stream"), http(PIECE, kind="text/event-stream", length=999),
                                  http(PIECE + "data: nonsense\n\n", kind="text/event-stream")])
def test_a_stream_that_breaks_off_says_so(live, said):
    with Odd(said) as odd, front(live, *(Engine(n, odd.url, n) for n in NAMES)) as server, client_of(server) as client:
        pieces = client.completions.create(model="glued", prompt="sort BA =", stream=True)
        assert next(pieces).choices[0].text == "A"
        with pytest.raises(openai.APIError, match="Engine of 'a-sort'"): list(pieces)
        until(lambda: server.backend.n_open == 0)

def test_an_engine_that_is_not_there(live):
    with socket.create_server(("127.0.0.1", 0)) as line: port = line.getsockname()[1]
    with front(live, *(Engine(n, f"http://127.0.0.1:{port}/v1", n) for n in NAMES)) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="can't be reached .ConnectError.. Is it running"):
            client.completions.create(model="glued", prompt="sort BA =")

@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_reaches_the_engine(live, engine, server, stream):
    "The engine's model is held; the client leaves; the engine learns of it and its place is free."
    opened, held = threading.Event(), threading.Event()
    hook = live.expert(0).model.register_forward_pre_hook(lambda *_: (held.set(), opened.wait(60)))
    try:
        body = json.dumps(dict(model="a-sort", prompt="sort IUJRH =", max_tokens=40, stream=stream))
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as line:
            line.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            assert held.wait(60)
            answer, = [a for lane in engine.backend.scheduler.lanes.values() for a in lane.answers.values()]
        until(lambda: answer.left)
        opened.set()
        until(lambda: engine.backend.scheduler.n_running == 0 and server.backend.n_open == 0)
        assert len(answer.row.new) < 3
    finally:
        opened.set()
        hook.remove()

def test_no_more_than_so_many_at_once(live, engine):
    with front(live, *(Engine(n, f"{engine.url}/v1", n, "s3cret") for n in NAMES), most_open=0) as server, client_of(server) as client:
        with pytest.raises(openai.RateLimitError): client.completions.create(model="glued", prompt="sort BA =")
