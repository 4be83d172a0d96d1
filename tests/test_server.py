"The API of a mixture: what clients get, under load, when they leave, and when the server does."
import asyncio, json, socket, threading
from contextlib import contextmanager
from queue import SimpleQueue

import httpx, openai, pytest

from waiting import until
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.scheduler import Served
from model_glue_nb.mixing.server import ApiServer, LocalBackend, ServerRules
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.decoding import greedy_tokens
from model_glue_nb.zoo.zoo import read_zoo

SKILLS = dict(zip(("a-sort", "a-reverse", "a-double", "b-shift"), ("sort", "reverse", "double", "shift")))
HINTS = [[f"{skill} CAB =", f"{skill} IUJRH ="] for skill in SKILLS.values()]
LETTERS = "SERVINGMODLK"

@pytest.fixture(scope="module")
def live(tmp_path_factory):
    "Three differences of one base and a whole model."
    spec = MixtureSpec(tuple(SKILLS), dict(name="prompt", positive=HINTS), level="adapter",
                       bases=("a-base",), difference=dict(rank=8))
    return mix(spec, read_zoo("demo"), tmp_path_factory.mktemp("mixture")/"glued").load("cpu")

@contextmanager
def serving(live, rules=ServerRules(), **limits):
    with ApiServer(LocalBackend(Served(live, "glued"), **limits), rules=rules) as server: yield server

@pytest.fixture(scope="module")
def server(live):
    with serving(live) as s: yield s

def client_of(server, key="none", kind=openai.OpenAI):
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)

@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as c: yield c

def user(text): return [dict(role="user", content=text)]
def prompt(i): return f"{list(SKILLS.values())[i % 4]} {LETTERS[i % 7:i % 7 + 1 + i % 5]} ="

class Gate:
    "Holds the base's passes until it is opened; what is held is a state one can wait for."
    def __init__(self, model):
        self.open, self.held = threading.Event(), threading.Event()
        self.hook = model.register_forward_pre_hook(self.pass_by)
        self.open.set()
    def pass_by(self, *_):
        if not self.open.is_set():
            self.held.set()
            assert self.open.wait(60)
    def close(self):
        self.held.clear()
        self.open.clear()

@pytest.fixture
def gate(live):
    made = Gate(live.shared_base(0).live.model)
    yield made
    made.open.set()
    made.hook.remove()

# ---- what a client gets
def test_a_chat_is_answered_as_the_mixture_answers_it(live, client):
    got = client.chat.completions.create(model="glued", messages=user("reverse KLMNO ="), max_completion_tokens=12)
    assert got.choices[0].message.content == "".join(live.chat(user("reverse KLMNO ="), 12)) != ""
    assert got.object == "chat.completion" and got.choices[0].finish_reason == "stop"
    assert got.route["expert"] == "a-reverse" and not got.route["forced"]
    assert max(got.route["scores"], key=got.route["scores"].get) == "a-reverse" and set(got.route["scores"]) == set(SKILLS)

def test_usage_counts_tokens(live, client):
    expert = live.expert(0)
    ids = expert.encode(["sort IUJRH ="])
    written, = greedy_tokens(expert.model, ids, expert.end_tokens(), 12)
    got = client.completions.create(model="a-sort", prompt="sort IUJRH =", max_tokens=12)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids[0]), len(written)), "the end token is one"
    assert written[-1] in expert.end_tokens() and got.usage.total_tokens == len(ids[0]) + len(written)

def test_an_answer_that_is_cut_says_so(client):
    got = client.completions.create(model="a-sort", prompt="sort IUJRH =", max_tokens=2)
    assert got.choices[0].finish_reason == "length" and got.usage.completion_tokens == 2

def test_several_prompts_several_answers(live, client):
    prompts = [prompt(i) for i in range(5)]
    got = client.completions.create(model="glued", prompt=prompts, max_tokens=12)
    assert [c.text for c in got.choices] == live.generate(prompts, 12) and [c.index for c in got.choices] == list(range(5))
    assert [r["expert"] for r in got.route] == [live.experts[e].name for e in live.route(prompts)]
    drawn = client.completions.create(model="glued", prompt=prompts[:2], max_tokens=8, n=3, temperature=1.5, seed=4)
    again = client.completions.create(model="glued", prompt=prompts[1], max_tokens=8, n=3, temperature=1.5, seed=4)
    assert [c.text for c in drawn.choices[3:]] == [c.text for c in again.choices], "neighbors and their number don't matter"
    assert len({c.text for c in drawn.choices}) > 2
    one = client.completions.create(model="glued", prompt=prompts[1], max_tokens=8)
    assert again.usage.prompt_tokens == one.usage.prompt_tokens, "read once"

def test_a_stop_string_is_not_said(client):
    whole = client.completions.create(model="a-sort", prompt="sort IUJRH =", max_tokens=12).choices[0].text
    for stop in (whole[2:4], [whole[3], whole[2]]):
        got = client.completions.create(model="a-sort", prompt="sort IUJRH =", max_tokens=12, stop=stop)
        assert (got.choices[0].text, got.choices[0].finish_reason) == (whole[:2], "stop")

@pytest.mark.parametrize("asked", ["glued", "b-shift", "a-sort"])
def test_a_stream_is_the_answer_in_pieces(client, asked):
    how = dict(model=asked, messages=user("reverse KLMNO ="), max_tokens=12)
    whole = client.chat.completions.create(**how)
    *chunks, last = client.chat.completions.create(**how, stream=True, stream_options=dict(include_usage=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert len(chunks) > 4 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, whole.choices[0].finish_reason]
    assert last.choices == [] and last.usage == whole.usage and chunks[0].route == whole.route
    assert whole.route["forced"] == (asked != "glued") and len({c.id for c in [*chunks, last]}) == 1

def test_streams_of_several_prompts_are_told_apart(live, client):
    prompts = [prompt(i) for i in range(4)]
    texts, ends = [""] * 4, []
    for c in client.completions.create(model="glued", prompt=prompts, max_tokens=12, stream=True):
        texts[c.choices[0].index] += c.choices[0].text
        ends += [c.choices[0].index] if c.choices[0].finish_reason else []
    assert texts == live.generate(prompts, 12) and sorted(ends) == [0, 1, 2, 3]

def test_the_expert_is_a_header_too(server):
    for stream in (False, True):
        got = httpx.post(f"{server.url}/v1/completions", json=dict(model="glued", prompt="sort CAB =", stream=stream))
        assert got.headers["x-model-glue-expert"] == "a-sort"

def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["glued", *SKILLS]
    assert client.models.retrieve("a-sort").id == "a-sort"

# ---- under load
def test_two_hundred_at_once_lose_nothing(live, server):
    "Each answer is the one that its prompt gets alone; half of them are streamed, a third asks an expert by name."
    names = list(SKILLS)
    asked = [(prompt(i), "glued" if i % 3 else names[i // 3 % 4], 1 + i % 11) for i in range(200)]
    def alone(text, name, most):
        e = int(live.route([text])[0]) if name == "glued" else names.index(name)
        return live.expert(e).generate([text], most)[0]
    known = {a: alone(*a) for a in set(asked)}
    before = server.backend.scheduler.n_steps, server.backend.scheduler.n_rows
    async def ask(client, i):
        text, name, most = asked[i]
        got = await client.completions.create(model=name, prompt=text, max_tokens=most, stream=i % 2 == 0)
        if i % 2: return got.choices[0].text
        return "".join([c.choices[0].text async for c in got])
    async def everybody():
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(200)))
    said = asyncio.run(everybody())
    assert [s for s, a in zip(said, asked) if s != known[a]] == [] and len(said) == 200
    assert len(set(said)) > 40
    s = server.backend.scheduler
    steps, rows = s.n_steps - before[0], s.n_rows - before[1]
    assert rows > 3 * steps, "they were written together"
    assert (s.n_running, len(s.waiting)) == (0, 0)

def test_a_full_queue_says_so(live, gate):
    with serving(live, queue=2, rows=1) as server, client_of(server) as client:
        gate.close()
        waiting = [threading.Thread(target=client.completions.create, kwargs=dict(model="a-sort", prompt=f"sort {x} ="))
                   for x in ("BA", "CA", "DA")]
        waiting[0].start()
        assert gate.held.wait(60)
        for t in waiting[1:]: t.start()
        until(lambda: len(server.backend.scheduler.waiting) == 2)
        with pytest.raises(openai.RateLimitError) as e: client.completions.create(model="a-sort", prompt="sort EA =")
        assert e.value.code == "queue_full" and "2 of 2 places" in e.value.message
        gate.open.set()
        for t in waiting: t.join()
        assert client.completions.create(model="a-sort", prompt="sort EA =").choices[0].text

# ---- clients that leave, answers that are late
@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_place(live, gate, stream):
    with serving(live, rows=1) as server, client_of(server) as client:
        gate.close()
        s, body = server.backend.scheduler, json.dumps(dict(model="a-sort", prompt="sort IUJRH =", max_tokens=40, stream=stream))
        lines = [socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) for _ in range(2)]
        for line in lines: # the first is being written, the second waits
            line.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: s.n_running == 1)
        until(lambda: len(s.waiting) == 1)
        answers = [*list(s.lanes.values())[0].answers.values(), *s.waiting]
        for line in lines: line.close()
        until(lambda: all(a.left for a in answers))
        gate.open.set()
        until(lambda: s.n_running == 0 and not s.waiting)
        assert len(answers[0].row.new) < 3 and answers[1].row is None, "the work has stopped, or never begun"
        assert client.completions.create(model="a-sort", prompt="sort BA =").choices[0].text
        assert 'requests_total{status="499"} 2' in server.counters.page() or stream

def test_an_answer_that_takes_too_long_ends(live, gate):
    now = [0.]
    with serving(live, seconds=5, clock=lambda: now[0]) as server, client_of(server) as client:
        gate.close()
        failed = SimpleQueue()
        def ask():
            try: client.completions.create(model="a-sort", prompt="sort IUJRH =")
            except openai.APIError as e: failed.put(e)
        thread = threading.Thread(target=ask)
        thread.start()
        assert gate.held.wait(60)
        now[0] = 5.1
        gate.open.set()
        error = failed.get(timeout=60)
        thread.join()
        assert (error.status_code, error.code) == (504, "too_slow") and "more than 5 seconds" in error.message
        now[0] = 10
        assert client.completions.create(model="a-sort", prompt="sort BA =").choices[0].text, "the time counts from the question on"

# ---- errors
BAD = [(dict(temprature=1), "temprature"), (dict(frequency_penalty=1), "frequency_penalty"), (dict(n=2), "n"),
       (dict(max_tokens=10**6), "max_tokens"), (dict(logit_bias={"5": 1}), "logit_bias"), (dict(temperature="hot"), "temperature")]

@pytest.mark.parametrize("more, param", BAD, ids=[p for _, p in BAD])
def test_what_is_not_done_is_refused_by_name(client, more, param):
    with pytest.raises(openai.BadRequestError, match=param) as e:
        client.chat.completions.create(model="glued", messages=user("sort CAB ="), extra_body=more)
    assert e.value.param == param and e.value.type == "invalid_request_error"

@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long_is_a_bad_request(client, stream):
    with pytest.raises(openai.BadRequestError, match="Shorten it") as e:
        client.chat.completions.create(model="glued", messages=user("sort " + "A" * 100), stream=stream)
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "messages")
    got = client.completions.create(model="a-sort", prompt="sort BA =", max_tokens=40)
    assert got.choices[0].text, "64 tokens are there in all"
    with pytest.raises(openai.BadRequestError, match="60 more are asked for"):
        client.completions.create(model="a-sort", prompt="sort BA =", max_tokens=60, stream=stream)

def test_an_unknown_model_is_named_with_the_nearest(client):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'a-sort'") as e:
        client.completions.create(model="a-sorts", prompt="sort BA =")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError): client.models.retrieve("nobody")

def test_bodies_of_every_kind(server):
    def status(**what): return httpx.post(f"{server.url}/v1/chat/completions", **what)
    for raw in (b"", b"{", b"[1]", b"\xff\xfe", b'{"model": 3}', b"[" * 5000, b'{"model": "glued", "messages": [{"role": NaN}]}'):
        got = status(content=raw)
        assert got.status_code == 400 and got.json()["error"]["type"] == "invalid_request_error", raw
    huge = b'{"model": "' + b"x" * 2**22 + b'"}'
    for content in (huge, iter([huge[:2**21]] * 3)): # its length said in advance, or found out
        got = status(content=content)
        assert (got.status_code, got.json()["error"]["code"]) == (413, "request_too_large")
    assert httpx.get(f"{server.url}/v1/completions").json()["error"]["message"] == "GET /v1/completions: Method Not Allowed."

def test_a_body_that_never_comes_is_not_waited_for(live):
    with serving(live, ServerRules(reading_s=.01)) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert line.recv(2**12).startswith(b"HTTP/1.1 408")

def test_a_token_guards_all_but_health(live):
    with serving(live, ServerRules(token="sésame")) as server:
        with client_of(server, "wrong") as wrong, pytest.raises(openai.AuthenticationError) as e:
            wrong.completions.create(model="a-sort", prompt="sort BA =")
        assert e.value.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics"): assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        for given, status in (("Bearer sésame", 200), ("bearer sésame", 200), ("sésame", 401), ("Bearer s", 401), ("Basic sésame", 401)):
            got = httpx.get(f"{server.url}/v1/models", headers={b"authorization": given.encode()})
            assert got.status_code == status, given

def test_a_model_that_fails_takes_nobody_with_it(live, server, client):
    base = live.shared_base(0).live.model
    def fail(*_): raise RuntimeError("sort BA = is on fire")
    hook = base.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError): client.completions.create(model="a-sort", prompt="sort BA =")
        assert client.completions.create(model="b-shift", prompt="shift BA =").choices[0].text
    finally: hook.remove()
    assert client.completions.create(model="a-sort", prompt="sort BA =").choices[0].text == live.expert(0).generate(["sort BA ="], 16)[0]

# ---- what is told of them
def test_lines_and_counters_hold_no_prompts(live):
    lines = []
    with serving(live, ServerRules(log=lines.append)) as server, client_of(server) as client:
        client.completions.create(model="glued", prompt="sort IUJRH =")
        with pytest.raises(openai.BadRequestError): client.completions.create(model="glued", prompt="sort IUJRH =", extra_body=dict(best_of=2))
        page = httpx.get(f"{server.url}/metrics").text
    assert lines[0].startswith("POST /v1/completions 200 ") and lines[0].endswith("tokens a-sort") and " 400 " in lines[1]
    assert not any("IUJRH" in x for x in [*lines, page])
    for line in ('answers_total{expert="a-sort",reason="stop"} 1', 'requests_total{status="200"} 1', 'requests_total{status="400"} 1',
                 'answer_seconds_count{expert="a-sort"} 1', "waiting 0", "running 0"):
        assert f"model_glue_{line}" in page, line

# ---- an orderly end
@pytest.mark.parametrize("stream", [True, False])
def test_what_has_begun_is_answered_and_the_rest_refused(live, gate, stream):
    with serving(live) as server, client_of(server) as client, client_of(server) as late:
        late.models.list() # its line is open already
        gate.close()
        got = SimpleQueue()
        def ask():
            a = client.completions.create(model="a-sort", prompt="sort IUJRH =", stream=stream)
            got.put("".join(c.choices[0].text for c in a) if stream else a.choices[0].text)
        thread = threading.Thread(target=ask)
        thread.start()
        assert gate.held.wait(60)
        server.stop()
        until(lambda: server.backend.closing)
        with pytest.raises(openai.InternalServerError) as e: late.completions.create(model="a-sort", prompt="sort BA =")
        assert (e.value.status_code, e.value.code) == (503, "stopping")
        assert httpx.get(f"{server.url}/health").status_code == 503
        gate.open.set()
        thread.join()
        assert got.get(timeout=60) == live.expert(0).generate(["sort IUJRH ="], 16)[0]
        server.thread.join(60)
        assert not server.thread.is_alive() and not server.backend.scheduler.thread.is_alive()

def test_a_second_stop_does_not_wait(live, gate):
    with serving(live) as server, client_of(server) as client:
        gate.close()
        failed = SimpleQueue()
        def ask():
            try: client.completions.create(model="a-sort", prompt="sort IUJRH =")
            except openai.APIError as e: failed.put(e)
        threading.Thread(target=ask).start()
        assert gate.held.wait(60)
        for _ in range(2): server.stop()
        until(lambda: server.backend.scheduler.ended)
        gate.open.set()
        assert failed.get(timeout=60).status_code == 503
