"Hostile programs, every way into the sandbox: the run goes on, the item fails, no process and no file is left behind."
import json, os, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

import pytest

from model_glue_nb import sandbox
from model_glue_nb.core import InputError
from model_glue_nb.sandbox import CodeEval, Limits, a_user, passes, run_program, sandboxed_code_eval, try_code, way_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
root, site = Path(__file__).resolve().parents[1], Path(pytest.__file__).resolve().parents[1]
SYSTEM = shutil.which("python3", path="/usr/bin") # an interpreter that any user may start
TIGHT = dict(seconds=1.5, cpu_s=1, memory_bytes=2**28, file_bytes=2**24, n_processes=6)
STRANGER = 61100 # a user of nobody, outside the numbers that the sandbox gives out
OPEN = Path("/var/tmp")/f"sandbox_test_{os.getpid()}" # where anybody may write

def same_version():
    if not SYSTEM: return False
    code = "import sys; print(*sys.version_info[:2])"
    return subprocess.run([SYSTEM, "-c", code], capture_output=True, text=True).stdout.split() == [str(v) for v in sys.version_info[:2]]

def ways():
    "Those that can be tried here; root can also try how it is for others."
    if os.geteuid(): return ["user"]
    return ["root"] + ["uid"] * bool(SYSTEM and not sandbox.open_home()) + ["user"] * same_version()

def attempt(code, tests="", way="root", **limits):
    "An outcome as a dict; as a stranger where root tries the way of others."
    limits = TIGHT | limits
    if way != "user" or os.geteuid():
        how = dict(python=SYSTEM) if way == "uid" else {}
        return vars(try_code(code, tests, Limits(**limits), way=way, **how))
    script = ("import json, sys; from model_glue_nb.sandbox import *; c, t, l = json.load(sys.stdin); "
              "print(json.dumps(vars(try_code(c, t, Limits(**l), way='user'))))")
    env = dict(HOME="/tmp", PATH="/usr/bin:/bin", PYTHONPATH=f"{root}:{site}", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([SYSTEM, "-c", script], input=json.dumps([code, tests, limits]), text=True, capture_output=True, env=env,
                          cwd="/", user=STRANGER, group=STRANGER, extra_groups=[])
    if "cannot be run here" in done.stderr or "cannot start" in done.stderr: pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def left():
    "Processes of programs and files of their users."
    ours = lambda uid: 61184 <= uid < 65520 or uid == STRANGER
    found = set()
    for p in Path("/proc").glob("[0-9]*"):
        try:
            state = (p/"stat").read_text().rsplit(")", 1)[1].split()[0]
            if state not in "ZX" and (ours(p.stat().st_uid) or b"program.py" in (p/"cmdline").read_bytes()): found.add(str(p))
        except OSError: pass
    for d in ("/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir()):
        for f in os.scandir(d):
            try: mine = ours(f.stat(follow_symlinks=False).st_uid)
            except OSError: continue
            if mine or f.name.startswith(("model_glue_sandbox", "sandbox_test")): found.add(f.path)
    return found

every = pytest.mark.parametrize("way", ways())
CAME = "print('CAME' + ' THROUGH')"
FORKS = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"

HOSTILE = dict(
    fork_bomb=FORKS,
    loop="while True: pass",
    sleep="import time; time.sleep(1000)",
    deaf="import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    orphans="import os, time\nfor _ in range(3):\n    if not os.fork():\n        os.setsid(); time.sleep(1000)\nos._exit(0)",
    memory=f"x = bytearray(10 * 2**30); {CAME}",
    memory_bit_by_bit=f"x = []\nfor _ in range(10 * 2**10): x.append(bytearray(2**20))\n{CAME}",
    file=f"with open('x', 'wb') as f:\n    for _ in range(10 * 2**10): f.write(bytes(2**20))\n{CAME}",
    sparse_file=f"import os; os.truncate(open('x', 'wb').fileno(), 10 * 2**30); {CAME}",
    home=f"import os; print(os.listdir({str(Path.home())!r} + '/.ssh'), open({str(Path.home())!r} + '/.bashrc').read()); {CAME}",
    passwords=f"print(open('/etc/shadow').read()); {CAME}",
    parent="import os, signal, time\nfor p in {1, os.getppid()}:\n    try: os.kill(p, signal.SIGKILL)\n    except OSError: pass\nassert False",
    everybody="import os, signal; os.kill(-1, signal.SIGKILL); assert False",
    group="import os, signal; os.killpg(0, signal.SIGKILL)",
    outside=f"open('/usr/here', 'w').write('x'); {CAME}",
    overwrite=f"open(__file__, 'w').write('x'); {CAME}",
    more_rights=f"import os; os.setuid(0); {CAME}",
    trace=f"import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0; {CAME}",
    early="import os; os._exit(0)",
    recursion=f"import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf(); {CAME}",
    flood="while True: print('x' * 10**6)",
    garbage="\0 this is no Python",
)

@every
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, way):
    before = left(); began = time.monotonic()
    out = attempt(HOSTILE[name], "", way)
    assert not out["passed"] and out["why"] and "CAME THROUGH" not in out["output"], out
    assert time.monotonic() - began < 30
    assert not left() - before
    assert attempt("x = 1", "assert x == 1", way)["passed"] # the next one is none the worse

@every
def test_what_is_right_passes(way):
    assert attempt("import math, json, re, collections, threading\ndef f(x): return math.sqrt(x)", "assert f(4) == 2", way)["passed"]
    assert attempt("open('notes', 'w').write('x')", "assert open('notes').read() == 'x'", way)["passed"]
    out = attempt("def f(x): return x", "assert f(4) == 2, 'four is not two'", way)
    assert not out["passed"] and "four is not two" in out["why"]

@every
def test_empty_folder_and_nothing_inherited(way, monkeypatch):
    monkeypatch.setenv("OUR_TOKEN", "xyzzy")
    fd = os.open(root/"settings.ini", os.O_RDONLY); os.set_inheritable(fd, True)
    code = (f"import os\nprint(os.listdir('.'), dict(os.environ))\n"
            f"for n in range(4, 64):\n    try: os.fstat(n); print('OPEN', n)\n    except OSError: pass\n1 / 0")
    out = attempt(code, "", way); os.close(fd)
    assert out["output"].startswith("[] {") and "xyzzy" not in out["output"] and "OPEN" not in out["output"]

@every
def test_writing_where_anybody_may(way):
    before = left()
    for place in (OPEN, Path("/dev/shm")/OPEN.name, Path("/tmp")/OPEN.name):
        attempt(f"open({str(place)!r}, 'w').write('x')", "", way); assert not place.exists()
    assert not left() - before

@every
def test_network(way):
    if way == "uid": pytest.skip("without namespaces the network is the machine's, as the notebook says")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1).send(b'x'); {CAME}"
        out = attempt(code, "", way)
        assert not out["passed"] and "CAME THROUGH" not in out["output"]
        with pytest.raises(TimeoutError): server.accept()

@every
def test_all_files_together(way):
    if way == "uid": pytest.skip("only a file is limited where a program has no room of its own")
    out = attempt("for i in range(64): open(f'x{i}', 'wb').write(bytes(2**20))", "", way)
    assert "No space left" in out["why"]

@pytest.mark.skipif(not ways(), reason="no way in")
def test_a_run_that_is_killed_leaves_no_program():
    way = ways()[0]; before = left()
    code = f"from model_glue_nb.sandbox import *; try_code({FORKS!r}, '', Limits(seconds=60, cpu_s=60, n_processes=4), way={way!r})"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ | dict(PYTHONPATH=str(root)))
    for _ in range(300):
        if any(f.startswith("/proc") for f in left() - before): break
        time.sleep(.1)
    else: pytest.fail("the program did not start")
    run.kill(); run.wait()
    for _ in range(100):
        rest = {f for f in left() - before if f.startswith("/proc")}
        if not rest: break
        time.sleep(.1)
    assert not rest
    for f in left() - before: os.rmdir(f) # an empty folder, and no more

def test_refused_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr(sandbox, "run_program", lambda *a, **k: sandbox.Outcome(False, "cannot unshare")); way_in.cache_clear()
    with pytest.raises(InputError, match="Generated code cannot be run here.*cannot unshare.*Leave out the tasks"): way_in()
    with pytest.raises(InputError), sandboxed_code_eval(): pass
    way_in.cache_clear()

def test_an_open_home_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    tmp_path.chmod(0o755); assert "chmod 700" in sandbox.open_home()
    tmp_path.chmod(0o700); assert not sandbox.open_home()

def test_users_are_not_shared():
    with a_user() as one, a_user() as two: assert one != two and not {one, two} & {0, os.getuid()}

def test_code_eval_as_hugging_face_counts():
    good, bad = "def f(x): return x + 1", "def f(x): return 0"
    scores, results = CodeEval().compute(["assert f(1) == 2"] * 2, [[good, bad], [bad, bad]], k=[1, 2, 5])
    assert scores == {"pass@1": .25, "pass@2": .5} and [o["passed"] for _, o in results[0]] == [True, False]
    with pytest.raises(ValueError): CodeEval().compute(["x"], [], k=[1])

def test_lm_eval_is_given_the_sandbox_and_evaluate_is_left_as_it_was():
    import evaluate
    was = evaluate.load
    with sandboxed_code_eval(): assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load is was
