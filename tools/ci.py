"""Everything that is checked, stage by stage, some side by side, stopping at the first failure.

    python tools/ci.py                 all stages
    python tools/ci.py pytest docs     only these
"""
import argparse, os, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

root = Path(__file__).resolve().parents[1]
env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", LOKY_MAX_CPU_COUNT="1", # two test processes have both cores
                        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1",
                        PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
                        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
run, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "--timeout=600", "--durations=12", "--durations-min=5"]
two = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"] # a file's tests share what is dear to make; conftest orders the files
STAGES = dict(
    sync    = ("notebooks are clean and exported", run + ["tools/check_notebooks.py"]),
    nbdev   = ("notebook tests", run + ["tools/notebook_tests.py"]),
    docs    = ("docs site: every link and page", run + ["tools/build_docs.py", "--check"]),
    browser = ("JupyterLab and the report in a real browser", pytest + ["-m", "browser", "tests/test_browser.py", "tests/test_pictures.py"]),
    site    = ("the site in a real browser", pytest + ["-m", "browser", "tests/test_site.py"]),
    pytest  = ("laws and faults", pytest + two),
)
SIDE_BY_SIDE = [["sync"], ["nbdev", "docs"], ["browser", "site"], ["pytest"]] # a browser has long waits; what waits for it must not wait for three others

class Failed(Exception): pass

class Board:
    "What runs now; prints what a stage said when it has ended."
    def __init__(self, n): self.n, self.done, self.running, self.lock, self.stop = n, 0, {}, Lock(), False

    def start(self, name, words):
        with self.lock:
            if self.stop: raise Failed(name)
            print(f"== {name} starts: {STAGES[name][0]}", flush=True)
            job = subprocess.Popen(STAGES[name][1], cwd=root, env=env, stdout=words, stderr=subprocess.STDOUT, start_new_session=True)
            self.running[name] = job
        return job

    def end(self, name, words, seconds, code):
        with self.lock:
            del self.running[name]
            words.seek(0)
            said = words.read().decode(errors="replace")
            self.done += 1
            print(f"\n== {self.done}/{self.n} {name}: {STAGES[name][0]}\n{said}", end="")
            how = "ok" if not code else "stopped" if self.stop else "FAILED"
            print(f"== {name} {how} in {seconds:.0f} s", flush=True)
            if code: self.stop_all()
        if code: raise Failed(name)

    def stop_all(self):
        "End what still runs, with the processes that it started."
        self.stop = True
        for job in self.running.values():
            with suppress(ProcessLookupError): os.killpg(job.pid, signal.SIGTERM)

def run_stage(
    name, # Of a stage
    board, # `Board`
):
    "Run a stage; what it says is printed when it has ended."
    with tempfile.TemporaryFile() as words:
        began = time.time()
        code = board.start(name, words).wait()
        board.end(name, words, time.time() - began, code)

def ticks():
    "(at work, in all) time of all processors since the machine started; Linux tells it."
    try: times = list(map(int, Path("/proc/stat").read_text().split()[1:9]))
    except OSError: return 0, 0
    return sum(times) - sum(times[3:5]), sum(times) # all but idle and waiting for the disk

def run_all(
    chosen, # Names of stages
):
    "Run the stages in their order, some side by side, until all are done or one fails."
    board = Board(len(chosen))
    for group in filter(None, ([n for n in names if n in chosen] for names in SIDE_BY_SIDE)):
        before = ticks()
        with ThreadPoolExecutor(max(1, len(group))) as pool:
            try: list(pool.map(lambda name: run_stage(name, board), group))
            except Failed: sys.exit(1)
            except BaseException: # the pool waits for its stages
                board.stop_all()
                raise
        busy, whole = (b - a for a, b in zip(before, ticks()))
        if whole: print(f"== {' and '.join(group)}: the processors were at work {busy / whole:.0%} of the time", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)}; all when none is given")
    chosen = parser.parse_args().stages or list(STAGES)
    if wrong := [s for s in chosen if s not in STAGES]:
        parser.error(f"there is no stage '{wrong[0]}'; known: {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.time()
    run_all(chosen)
    print(f"\nAll {len(chosen)} stages ok in {time.time() - began:.0f} s", flush=True)

if __name__ == "__main__": main()
