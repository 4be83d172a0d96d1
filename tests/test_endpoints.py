"Members that are elsewhere: scored as they would be here, through every fault of a network, without a trace of the key; mixed, and never merged."
import json, signal, subprocess, sys

import pytest, yaml

from test_benchmark import tasks_folder
from vllm_like import VllmLike
from model_glue_nb.benchmarking.harness import as_lm_eval, respond
from model_glue_nb.benchmarking.scores import ask_model, ask_zoo, plan_scores
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.checkpoints import remote_calls
from model_glue_nb.core import InputError, Run
from model_glue_nb.gluing.recipe import begin, describe_run, read_recipe
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.mixing.forwarding import own_engines
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.scheduler import Served
from model_glue_nb.mixing.server import LocalBackend
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.store import Store
from model_glue_nb.zoo.compatibility import compare_pair
from model_glue_nb.zoo.zoo import demo_zoo_path, read_zoo

MAIN = [sys.executable, "-c", "from model_glue_nb.cli.program import main; main()"]
FAULTS = 429, 500, 503, "garbage", "hangs up", "none", "twice", "truncated"

@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    "Waits between tries are short, and the cache of entries is the test's own."
    monkeypatch.setattr(remote_calls.RemoteRules.__new__, "__defaults__", (16, 6, 120, .01, .05))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

@pytest.fixture(scope="module")
def here(): return read_zoo("demo")["a-sort"]

@pytest.fixture(scope="module")
def live(here): return here.load("cpu")

@pytest.fixture
def server(live):
    with VllmLike(live) as s: yield s

def far(server, **more): return read_zoo([server.entry(**more)])["far"]

@pytest.fixture(scope="module")
def own(): return load_suite("demo").part("report", 12).only(["sort", "shift"])

@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    "lm-eval's kinds of tasks."
    room = tmp_path_factory.mktemp("kinds")
    tasks_folder(room, 12)
    return load_suite(room/"suite.yaml")

def rows(store, model, suite): return {t.name: store.items(model.fingerprint(), t.asked) for t in suite.tasks}

# ---- equal to a model that is here
def test_our_own_server_gives_the_same_answers_item_by_item(here, own, kinds, tmp_path):
    "A process of its own; custom tasks and lm-eval's that generate."
    p = subprocess.Popen([*MAIN, "serve", str(here.path), "--port", "0", "--quiet"], stderr=subprocess.PIPE, text=True)
    try:
        p.stderr.readline()
        url = p.stderr.readline().split()[0]
        zoo = read_zoo([f"{url}#a-sort"])
        store, theirs = Store(tmp_path/"here.sqlite"), Store(tmp_path/"far.sqlite")
        for suite in (own, kinds.only(["sort", "shift"])):
            ask_model(here, suite, store)
            ask_zoo(zoo, suite, theirs)
            mine = rows(store, here, suite)
            assert mine == rows(theirs, zoo["a-sort"], suite)
            assert {len(r) for r in mine.values()} == {12} and any(v for v, _ in mine["sort"].values())
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 0
    finally: p.kill()

@pytest.mark.parametrize("more", [dict(), dict(forms=("prompt_logprobs",)), dict(tokenizer=True), dict(context=45, tokenizer=True)])
def test_every_kind_of_task_scores_as_it_does_here(here, live, own, kinds, tmp_path, more):
    entry = dict(tokenizer=str(here.path)) if more.pop("tokenizer", False) else {}
    with VllmLike(live, **more) as server:
        m, store, theirs = far(server, **entry), Store(tmp_path/"here.sqlite"), Store(tmp_path/"far.sqlite")
        for suite in (own, kinds.only(["sort", "choose"])):
            ask_model(here, suite, store)
            ask_model(m, suite, theirs)
            assert rows(store, here, suite) == rows(theirs, m, suite)

@pytest.mark.parametrize("form", ["echo", "prompt_logprobs"])
@pytest.mark.parametrize("tokens", [False, True])
def test_log_likelihoods_are_those_of_the_model(here, live, form, tokens):
    from lm_eval.api.instance import Instance
    pairs = [("sort IUJRH =", " HIJRU"), ("sort IUJRH = ", "HIJRU"), ("sort IUJRH =", " "), ("sort BA", " = AB"), ("w", "xyz"), ("sort DCBA =", live.generate(["sort DCBA ="], 3)[0])]
    def scored(lm):
        requests = [Instance("loglikelihood", {}, p, i, metadata=("pairs", i, 1)) for i, p in enumerate(pairs)]
        respond(as_lm_eval(lm), requests, "any")
        return [r.resps[0] for r in requests]
    with VllmLike(live, forms=(form,)) as server:
        remote = far(server, **dict(tokenizer=str(here.path)) if tokens else {}).load()
        mine, theirs = scored(live), scored(remote)
        assert [g for _, g in theirs] == [g for _, g in mine] and {True, False} == {g for _, g in mine}
        assert [v for v, _ in theirs] == pytest.approx([v for v, _ in mine], abs=1e-4) and remote.form == form

def test_conversations_use_the_servers_template(live, own, tmp_path):
    from dataclasses import replace
    from copy import copy, deepcopy
    from model_glue_nb.benchmarking.chats import Chat
    talker = copy(live)
    talker.tokenizer = deepcopy(live.tokenizer)
    talker.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    def as_sent(text): return talker.tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"]
    chats = replace(own, tasks=tuple(replace(t, chat=Chat(True)) for t in own.tasks))
    with VllmLike(talker) as server:
        m, store = far(server), Store(tmp_path/"s.sqlite")
        ask_model(m, chats, store)
        assert all("messages" in b for b in server.asked[3:])
        for t in chats.tasks:
            said = {q.key: talker.continue_batch([as_sent(q.prompt)], t.max_new_tokens, list(t.stop))[0] for q in t.questions}
            assert {k: answer for k, (_, answer) in rows(store, m, chats)[t.name].items()} == said
        alone = far(server, api="chat") # its bare prompts are messages too, and it has another identity
        server.asked.clear()
        assert alone.fingerprint() != m.fingerprint() and all("messages" in b for b in server.asked)
        assert alone.load().generate(["sort BA ="], 4) == talker.continue_batch([as_sent("sort BA =")], 4, [])

# ---- what a server can't do is said by name
def test_what_is_not_given_is_not_guessed(live, kinds, tmp_path):
    choose, read = kinds.only(["choose"]), kinds.only(["read"])
    with VllmLike(live, forms=()) as server:
        with pytest.raises(InputError, match="'far' gives no log-likelihoods of what it reads(.|\n)*echo is not supported"): ask_model(far(server), choose)
        with pytest.raises(InputError, match="its API is chat"): ask_model(far(server, api="chat"), choose)
        with pytest.raises(InputError, match="perplexities of whole texts"): ask_model(far(server), read)
        with pytest.raises(InputError, match="maximum context length is 64 tokens.*status 400"): far(server).load().generate(["sort " + "A" * 80], 4)
        assert far(server).load().generate(["sort BA ="], 0) == [""]

# ---- faults
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(here, live, server, kinds, tmp_path, fault):
    suite, store = kinds.only(["sort", "choose"]), Store(tmp_path/"s.sqlite")
    m = far(server)
    m.fingerprint()
    n, server.faults = len(server.asked), [fault] * 2
    ask_model(m, suite, store)
    ask_model(here, suite, store)
    assert rows(store, m, suite) == rows(store, here, suite)
    texts, contexts, choices = 12, 24, 72
    assert len(server.asked) == n + 2 + texts + 1 + contexts + choices

@pytest.mark.parametrize("fault", [*FAULTS, 400, 404])
def test_a_fault_that_stays_costs_what_was_in_flight(here, live, server, own, kinds, tmp_path, fault):
    "What was answered is kept, the member is set aside with the reason, others are scored, and a second try asks the rest alone."
    for suite in (own, kinds.only(["sort"])):
        store, zoo = Store(tmp_path/f"{suite.name}.sqlite"), read_zoo([str(here.path), server.entry(together=2)])
        n = len([q for t in suite.tasks for q in t.questions])
        m, aside = zoo["far"], {}
        m.fingerprint()
        server.asked.clear()
        server.faults, server.always = [None] * 7, fault
        found = ask_zoo(zoo, suite, store, aside=aside)
        assert list(found) == [here.name] and list(aside) == ["far"] and "Endpoint 'far'" in aside["far"], aside
        assert len(server.asked) <= 7 + 2 * 3, "no more than two were in flight, three times each"
        server.always = None
        server.asked.clear()
        ask_model(m, suite, store)
        assert len(server.asked) == n - 7
        assert rows(store, m, suite) == rows(store, here, suite)

def test_a_silent_server_is_not_waited_for(live, server):
    m = far(server, seconds=.3, tries=2)
    m.fingerprint()
    server.always = "silence"
    with pytest.raises(InputError, match="no sign of life for 0.3 s .2 tries."): m.load().generate(["sort BA ="], 4)

def test_a_server_that_goes_away_and_comes_back(live, own, here, tmp_path):
    store = Store(tmp_path/"s.sqlite")
    with VllmLike(live) as server:
        entry, port = server.entry(together=1), server.port
        m = read_zoo([entry])["far"]
        first = m.fingerprint()
        server.faults = [None] * 5 + ["hangs up"] * 3
        with pytest.raises(InputError, match="hung up"): ask_model(m, own, store)
    zoo = read_zoo([str(here.path), entry])
    assert zoo.names == [here.name] and "can't be reached" in zoo.skipped["far"] and "Is it running" in zoo.skipped["far"]
    with VllmLike(live, port=port) as server:
        m = read_zoo([entry])["far"]
        assert m.fingerprint() == first and plan_scores([m], own, store).remembered.sum() == 5
        server.asked.clear()
        ask_model(m, own, store)
        assert len(server.asked) == 24 - 5

def test_another_model_under_the_same_name_is_another_model(live, server):
    first = far(server).fingerprint()
    assert far(server).fingerprint() == first
    server.live = read_zoo("demo")["b-shift"].load("cpu")
    assert far(server).fingerprint() != first

# ---- the key
def test_the_key_is_nowhere_but_in_the_request(live, kinds, command, tmp_path, monkeypatch):
    (tmp_path/"suite.yaml").write_text(yaml.safe_dump(dict(name="one", tasks=[dict(name="sort", task=kinds.tasks[0].source.task)])))
    monkeypatch.setenv("FAR_KEY", "s3cret-k3y")
    monkeypatch.setenv("WRONG_KEY", "wr0ng-k3y")
    with VllmLike(live, key="s3cret-k3y") as server:
        entry = server.entry(key_env="FAR_KEY")
        (tmp_path/"zoo.yaml").write_text(yaml.safe_dump([entry, entry | dict(name="locked", key_env="WRONG_KEY"), entry | dict(name="unset", key_env="NO_KEY")]))
        code, out, err = command("score", tmp_path/"zoo.yaml", "--out", tmp_path/"run", "--suite", tmp_path/"suite.yaml", "--split", "all")
        assert code == 0 and "far" in out, err
        assert "it refused the key" in err and "NO_KEY, which isn't set" in err
        n = len(server.asked)
        server.always = 500
        code, again, more = command("score", tmp_path/"zoo.yaml", "--out", tmp_path/"run2", "--suite", tmp_path/"suite.yaml", "--split", "all")
        assert code == 2 and "your key is …" in more and len(server.asked) > n
        text = out + err + again + more + repr(far(server, key_env="FAR_KEY", tries=1).calls())
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name != "zoo.yaml"]
    assert len(files) > 3
    for said in (text.encode(), *(f.read_bytes() for f in files)):
        assert b"s3cret" not in said and b"wr0ng" not in said

# ---- where members are named
def test_an_endpoint_stands_where_a_model_does(here, server, command, tmp_path):
    (tmp_path/"models").mkdir()
    (tmp_path/"models/small").symlink_to(here.path)
    (tmp_path/"zoo.yaml").write_text(yaml.safe_dump(["./models", server.entry(), f"{server.url}#big"]))
    assert read_zoo(tmp_path/"zoo.yaml").names == ["small", "far", "big"]
    folder = tmp_path/"models/far"
    folder.mkdir()
    (folder/"endpoint.json").write_text(json.dumps(server.entry()))
    assert read_zoo(tmp_path/"models").names == ["far", "small"] and read_zoo(tmp_path/"models")["far"].kind == "endpoint"
    code, out, err = command("score", f"{server.url}#big", "--dry-run", "--json")
    assert code == 0 and {r["model"] for r in json.loads(out)} == {"big"}, err
    for entry, why in ((server.entry(api_key="x"), "A key stands in no file"), (server.entry(model="bog"), "Did you mean 'big'?"),
                       (server.entry(endpoint="http://u:p@h/v1"), "holds a name or a password"), ({}, "'endpoint' is missing"),
                       (f"{server.url}", "'model' is missing"), (server.entry(tokenizer=str(tmp_path)), "where there is none")):
        with pytest.raises(InputError, match=why.replace("?", ".")): read_zoo([entry])

# ---- merging and mixing
def test_what_has_no_weights_here_is_not_merged(here, server, tmp_path):
    zoo = read_zoo([str(here.path), str(demo_zoo_path()/"a-base"), server.entry()])
    with pytest.raises(InputError, match="'far' is an endpoint: its weights are elsewhere, so it can't be merged"):
        merge(recipe("linear", ["a-sort", "far"]), zoo, tmp_path/"merged")
    assert not (tmp_path/"merged").exists()
    assert "'far' is an endpoint" in str(compare_pair(zoo["a-sort"], zoo["far"]))
    with pytest.raises(InputError, match="level 'model' without a base"):
        mix(MixtureSpec(("a-sort", "far"), dict(name="random"), base="a-base", level="ffn"), zoo, tmp_path/"m")
    unsized = read_zoo([str(here.path), {k: v for k, v in server.entry().items() if k != "parameters"}])
    with pytest.raises(InputError, match="Add `parameters: 7e9`"): mix(MixtureSpec(("a-sort", "far"), dict(name="random")), unsized, tmp_path/"m")
    with pytest.raises(InputError, match="through 'far', an endpoint"):
        mix(MixtureSpec(("far", "a-sort"), dict(name="prompt", positive=HINTS), prompt_encoder="far"), zoo, tmp_path/"m")

HINTS = [["shift CAB =", "shift DEF ="], ["sort CAB =", "sort IUJRH ="]]
def test_an_endpoint_is_an_expert(here, tmp_path, monkeypatch):
    shift = read_zoo("demo")["b-shift"]
    prompts = ["sort IUJRH =", "shift CAB =", "sort BA =", "shift DEF ="]
    with VllmLike(shift.load("cpu")) as server:
        zoo = read_zoo([server.entry(), str(here.path)])
        both = Zoo2(("b-shift", "a-sort"), tmp_path/"both").generate(prompts, 12)
        made = mix(MixtureSpec(("far", "a-sort"), dict(name="prompt", positive=HINTS)), zoo, tmp_path/"glued", verify=True)
        (tmp_path/"cache").rename(tmp_path/"other cache") # the mixture holds the entry itself
        glued = made.load("cpu")
        assert glued.generate(prompts, 12) == both and glued.manifest["eyes"] == "a-sort"
        assert [list(glued.route(prompts))] == [[1, 0, 1, 0]]
        assert "".join(glued.stream("shift CAB =", 12)) == both[1]
        with pytest.raises(InputError, match="answers greedily"): glued.generate(["shift CAB ="], 4, temperature=1., seed=1)
        with pytest.raises(InputError, match="'far' is an endpoint and 'a-sort' is here"): own_engines(Served(glued))
        with pytest.raises(InputError, match="has an expert that is elsewhere"): LocalBackend(Served(glued))
        suite = load_suite("demo").part("report", 6).only(["sort", "shift"])
        store = Store(tmp_path/"s.sqlite")
        ask_model(made, suite, store)
        items = rows(store, made, suite)
        ask_model(here, suite, store)
        ask_model(zoo["far"], suite, store)
        of = [rows(store, m, suite) for m in (zoo["far"], here)]
        for t in suite.tasks:
            routes = dict(zip([q.key for q in t.questions], glued.route([q.prompt for q in t.questions])))
            assert items[t.name] == {k: of[e][t.name][k] for k, e in routes.items()} and len(routes) == 6

def Zoo2(names, out): return mix(MixtureSpec(names, dict(name="prompt", positive=HINTS)), read_zoo("demo"), out).load("cpu")

# ---- the whole recipe
MEMBERS = [str(demo_zoo_path()/m) for m in ("a-base", "a-sort", "a-reverse")]

@pytest.fixture
def given(tmp_path):
    "A recipe whose tasks are lm-eval's, of thirty questions each."
    tasks_folder(tmp_path/"tasks", 30)
    return dict(zoo=MEMBERS, suite=str(tmp_path/"tasks/suite.yaml"), tasks=["sort", "shift"], evidence=0,
                merge=dict(methods=["linear"], strategy="average", budget=3, executor="local"))

def test_what_a_recipe_cannot_do_with_an_endpoint_is_said_first(given, server, command, tmp_path):
    def refused(**change):
        with pytest.raises(InputError) as e: begin(read_recipe(given | dict(zoo=[*MEMBERS, server.entry()]) | change), tmp_path/"run")
        assert not (tmp_path/"run").exists()
        return str(e.value)
    assert "a budget can't count" in refused(budget="2x")
    assert "one checkpoint has no place" in refused(mixture=dict(level="ffn", base="a-base"))
    assert "All members of the zoo are endpoints" in refused(zoo=[server.entry()])
    assert "Add `parameters: 7e9`" in refused(zoo=[*MEMBERS, f"{server.url}#big"])
    (tmp_path/"r.yaml").write_text(yaml.safe_dump(given | dict(zoo=[*MEMBERS, server.entry()])))
    code, out, err = command("run", tmp_path/"r.yaml", "--out", tmp_path/"run", "--dry-run", "--json")
    assert code == 0 and any(r["step"] == "elsewhere" and "its weights can't be merged" in r["what"] for r in json.loads(out)), err

def test_a_run_whose_endpoint_is_gone_says_so_and_waits(given, live, tmp_path):
    with VllmLike(live) as server:
        r = read_recipe(given | dict(zoo=[*MEMBERS, server.entry()]))
        describe_run(begin(r, tmp_path/"run"))
        describe_run(begin(r, tmp_path/"run"))
    with pytest.raises(InputError, match="'far' of '.*run' can't be used now: .*can't be reached"): begin(r, tmp_path/"run")

@pytest.mark.slow
def test_a_run_scores_and_mixes_it_and_merges_the_others(given, command, tmp_path):
    with VllmLike(read_zoo("demo")["b-shift"].load("cpu")) as server:
        (tmp_path/"r.yaml").write_text(yaml.safe_dump(given | dict(zoo=[*MEMBERS, server.entry()])))
        code, out, err = command("run", tmp_path/"r.yaml", "--out", tmp_path/"run")
        assert code == 0, err
        run = Run(tmp_path/"run")
        assert run.read_table("similarity").set_index("Unnamed: 0").far.drop("far").isna().all()
        assert ["far"] in [c["members"] for c in run.read_json("clusters")]
        experts = json.loads((run.path/"models/full-mixture/mixture.json").read_text())["experts"]
        assert "far" in {e["name"] for e in experts} and (run.path/"models/full-mixture/experts/far/endpoint.json").is_file()
        scores = run.read_table("scores")
        assert set(scores[scores.model == "far"].task) == {"sort", "shift"}
        assert "far" in set(run.read_table("routing").expert)
