"`model-glue serve` and `model-glue chat`, as they are typed and piped."
import io, os, pty, re, signal, subprocess, sys, threading, time

import httpx, pytest

from waiting import until

from model_glue_nb.core import Run
from model_glue_nb.endings import Stopped
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.scheduler import Scheduler, Served
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import read_zoo, tiny_tokenizer, tiny_zoo

NAMES, HINTS = ("a-sort", "b-shift"), [["sort CAB =", "sort IUJRH ="], ["shift CAB =", "shift DEF ="]]
MAIN = [sys.executable, "-c", "from model_glue_nb.cli.program import main; main()"]

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return mix(MixtureSpec(NAMES, dict(name="prompt", positive=HINTS)), read_zoo("demo"), tmp_path_factory.mktemp("mixture")/"glued")

@pytest.fixture(scope="module")
def live(made): return made.load("cpu")

def says(live, e, prompt): return live.expert(e).generate([prompt], 40)[0]

# ---- serve
def test_a_run_is_served_until_ctrl_c(live, tmp_path):
    "As a process: what it chose, under the run's name, with a token from the environment, without prompts in its lines."
    run = tmp_path/"found"
    (run/"models").mkdir(parents=True)
    inside = mix(MixtureSpec(NAMES, dict(name="prompt", positive=HINTS)), read_zoo("demo"), run/"models"/"m").path
    Run(run).write_json("chosen", dict(folder=str(inside.relative_to(run))))
    environment = os.environ | dict(MODEL_GLUE_TOKEN="sesame")
    p = subprocess.Popen([*MAIN, "serve", str(run), "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [p.stderr.readline(), p.stderr.readline()]
        assert "answers as found; experts: a-sort, b-shift. Ctrl-C ends." in lines[1], lines
        url = lines[1].split()[0]
        asked = dict(model="found", prompt="sort IUJRH =", max_tokens=40)
        assert httpx.post(f"{url}/completions", json=asked).status_code == 401
        got = httpx.post(f"{url}/completions", json=asked, headers=dict(authorization="Bearer sesame"))
        assert got.json()["choices"][0]["text"] == says(live, 0, "sort IUJRH =")
        p.send_signal(signal.SIGINT)
        rest = p.stderr.read()
        assert p.wait(60) == 0 and rest.endswith("stopped\n") and " 200 " in rest and "IUJRH" not in rest
        assert "sesame" not in rest + "".join(lines)
    finally: p.kill()

@pytest.mark.parametrize("more, said", [(("--host", "0.0.0.0"), "has no token"), (("--engines", "nowhere.yaml"), "nowhere.yaml"),
                                        (("--name", "a-sort"), "--name"), (("--max-body", "lots"), "is not a size")])
def test_what_cannot_be_served_is_said_first(command, made, more, said, monkeypatch):
    monkeypatch.delenv("MODEL_GLUE_TOKEN", raising=False)
    before = threading.active_count()
    code, out, err = command("serve", made.path, "--port", "0", *more)
    assert code == 2 and said in err and threading.active_count() == before

def test_a_port_that_is_taken_is_said(command, made):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as line:
        code, out, err = command("serve", made.path, "--port", line.getsockname()[1])
    assert code == 2 and "Give another --port" in err

@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_the_extra_is_named_where_it_is_missing(command, made, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = command("serve", made.path)
    assert code == 2 and f"'{missing}'" in err and "pip install 'model_glue_nb[serve]'" in err

def test_nothing_of_the_web_is_loaded_unless_it_serves():
    code = ("import model_glue_nb, sys; from model_glue_nb.cli import program; import model_glue_nb.mixing.server, model_glue_nb.mixing.forwarding; "
            "print([m for m in ('fastapi', 'uvicorn', 'starlette') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

# ---- chat
@pytest.fixture
def piped(command, monkeypatch):
    def run(path, *lines, more=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        return command("chat", path, *more)
    return run

def test_a_piped_chat_is_plain_text(piped, made, live):
    code, out, err = piped(made.path, "sort IUJRH =", "", "/reset", "shift ABC =")
    assert (code, out) == (0, f"[a-sort] {says(live, 0, 'sort IUJRH =')}\n[b-shift] {says(live, 1, 'shift ABC =')}\n")
    assert "\x1b" not in out + err

def test_an_expert_is_asked_by_name(piped, made, live):
    shifted = says(live, 1, "sort IUJRH =")
    code, out, err = piped(made.path, "/expert b-shift", "sort IUJRH =", "/reset", "/expert", "sort IUJRH =", "/quit", "sort BA =")
    assert (code, out) == (0, f"[b-shift] {shifted}\n[a-sort] {says(live, 0, 'sort IUJRH =')}\n")
    assert "The router chooses among a-sort, b-shift." in err
    assert piped(made.path, "sort IUJRH =", more=("--expert", "b-shift"))[1] == f"[b-shift] {shifted}\n"

@pytest.mark.parametrize("line, said", [("/expert a-sorts", "Did you mean 'a-sort'?"), ("/rest", "Did you mean '/reset'?"), ("sort " + "A" * 99, "Shorten it")])
def test_what_fails_is_said_and_counts(piped, made, live, line, said):
    code, out, err = piped(made.path, line, "sort BA =")
    assert code == 2 and said in err and out == f"[a-sort] {says(live, 0, 'sort BA =')}\n", "the next line is answered, the failed one forgotten"

def test_the_whole_conversation_is_read(piped, tmp_path):
    zoo = tiny_zoo(tmp_path, ["a"], dtype="float32")
    words = tiny_tokenizer()
    words.chat_template = "<s>{% for m in messages %}{{ m.role == 'user' and 'w20' or m.role == 'system' and 'w21' or 'w22' }} {{ m.content }} {% endfor %}"
    words.save_pretrained(zoo["a"].path)
    live = read_zoo([zoo["a"].path])["a"].load("cpu")
    def answer(*turns):
        ids = live.tokenizer("<s>" + "".join(f"{sign} {text} " for sign, text in turns), add_special_tokens=False)["input_ids"]
        return live.continue_batch([ids], 8, [])[0]
    first = answer(("w21", "w5"), ("w20", "w3 w4"))
    second = answer(("w21", "w5"), ("w20", "w3 w4"), ("w22", first), ("w20", "w6"))
    again = answer(("w21", "w5"), ("w20", "w6"))
    code, out, err = piped(zoo["a"].path, "w3 w4", "w6", "/reset", "w6", more=("--system", "w5", "--max-tokens", "8"))
    assert (code, out) == (0, f"{first}\n{second}\n{again}\n") and len({first, second, again}) == 3

def test_ctrl_c_stops_an_answer_and_not_the_chat(made, live, capsys):
    "The model is held at its third pass; what was said stays in the conversation."
    from model_glue_nb.cli.chat import Conversation
    passes, opened, held = [], threading.Event(), threading.Event()
    def pass_by(*_):
        passes.append(1)
        if len(passes) == 3:
            held.set()
            assert opened.wait(60)
    model = live.expert(0).model
    hook = model.register_forward_pre_hook(pass_by)
    scheduler = Scheduler(Served(live))
    def interrupt():
        assert held.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
    try:
        talk = Conversation(scheduler, most=40)
        talk.expert = 0 # the router's reader is the same model
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        assert talk.take("sort IUJRH =")
        thread.join()
        opened.set()
        said = capsys.readouterr().out
        whole = says(live, 0, "sort IUJRH =")
        assert said.startswith("[a-sort] ") and said.endswith(" [stopped]\n")
        kept = talk.said[-1]["content"]
        assert talk.said[-1]["role"] == "assistant" and whole.startswith(kept) and len(kept) < len(whole)
        talk.take("/reset")
        assert talk.take("sort IUJRH =") and capsys.readouterr().out == f"[a-sort] {whole}\n"
    finally:
        signal.signal(signal.SIGINT, before)
        opened.set()
        hook.remove()
        scheduler.stop()

def test_the_end_of_the_program_is_not_an_answers_end(live, monkeypatch):
    from model_glue_nb.cli.chat import Conversation
    scheduler = Scheduler(Served(live))
    def pieces(self):
        raise Stopped("SIGTERM")
        yield
    monkeypatch.setattr(Conversation, "_pieces", pieces)
    with pytest.raises(Stopped): Conversation(scheduler).take("sort BA =")
    scheduler.stop()

def sleeps(pid):
    "Does the main thread wait for a key? A signal just before it does is only seen at the next key."
    def state(): return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    return all(state() == "S" for _ in range(5))

def test_a_terminal_has_a_prompt_and_colors(made, live):
    ours, theirs = pty.openpty()
    p = subprocess.Popen([*MAIN, "chat", str(made.path)], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | dict(TERM="xterm"))
    os.close(theirs)
    seen = b""
    def read_until(mark):
        nonlocal seen
        seen = b""
        while mark not in seen: seen += os.read(ours, 4096)
        return seen.decode()
    try:
        assert "/help lists commands" in read_until(b"> ")
        os.write(ours, b"sort IUJRH =\n")
        said = read_until(b"\n> ")
        assert re.search(r"\x1b\[36m\[a-sort\] \x1b\[0m" + says(live, 0, "sort IUJRH ="), said), said
        until(lambda: sleeps(p.pid))
        p.send_signal(signal.SIGINT) # at the prompt it ends, quietly
        assert p.wait(60) == 0 and b"Interrupted" not in os.read(ours, 4096)
    finally:
        p.kill()
        os.close(ours)
