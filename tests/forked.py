"""The command line, or any code, in a process of its own that is forked from one where the imports are done.

Such a process has its own streams, folder, environment and exit code, and can be killed, as one that Python starts anew;
importing torch, transformers and lm-eval, which takes seconds each time, is done once. Where the imports themselves, or what
is read from the environment when they are done, matter, a test starts Python anew."""
import atexit, multiprocessing, os, shutil, signal, subprocess, sys, tempfile
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

MAIN = "from model_glue_nb.cli.program import main; main()"
IMPORTS = ["torch", "pandas", "scipy.stats", "sklearn.linear_model", "transformers.models.auto", "transformers.models.llama.modeling_llama",
           "transformers.models.qwen2.modeling_qwen2", "transformers.generation", "datasets", "lm_eval.api.model", "lm_eval.tasks",
           "lm_eval.models.huggingface", "numba", "optuna", "plotly", "sqlalchemy", "model_glue_nb.cli.program"]

@cache
def server(): # one per process of pytest, started when it is first needed
    "Where processes are forked: nothing but imports was done there, no thread but the allocator's runs, and caches that imports choose are empty."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with patch.dict(os.environ, XDG_CACHE_HOME=home): forkserver.ensure_running()
    return context

def live(code, args, folder, environ, out, err):
    "What the new process does."
    signal.signal(signal.SIGINT, signal.default_int_handler) # which a server ignores
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["-c", *args]
    sys.path[:0] = [p for p in environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    try: exec(compile(code, "<string>", "exec"), dict(__name__="__main__"))
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr): stream.flush()

class Forked:
    "A process that was started; `end` waits for it."
    def __init__(self, code, *args, cwd=None, env=None):
        self.room = tempfile.TemporaryDirectory()
        self.args = list(map(str, args))
        self.streams = [str(Path(self.room.name)/n) for n in ("out", "err")]
        given = code, self.args, str(cwd or os.getcwd()), dict(os.environ if env is None else env), *self.streams
        self.process = server().Process(target=live, args=given)
        self.process.start()
        self.pid = self.process.pid

    def poll(self): return self.process.exitcode

    def kill(self): os.kill(self.pid, signal.SIGKILL)

    def end(self)->subprocess.CompletedProcess:
        "Exit code and what was said, as `subprocess.run` returns them."
        self.process.join()
        said = [Path(f).read_text() if os.path.exists(f) else "" for f in self.streams]
        self.room.cleanup()
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *said)

def python(code, *args, cwd=None, env=None):
    "Run code in a process of its own."
    return Forked(code, *args, cwd=cwd, env=env).end()

def command(*args, cwd=None, env=None):
    "Run a command of `model-glue` in a process of its own."
    return python(MAIN, *args, cwd=cwd, env=env)
