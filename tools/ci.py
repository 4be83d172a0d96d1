"""Everything that is checked, stage by stage, stopping at the first failure.

    python tools/ci.py                 all stages
    python tools/ci.py pytest docs     only these
"""
import argparse, os, subprocess, sys, tempfile, time
from contextlib import ExitStack
from pathlib import Path

root = Path(__file__).resolve().parents[1]
env = os.environ | dict(OMP_WAIT_POLICY="passive", LOKY_MAX_CPU_COUNT="1", # two test processes have both cores
                        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1",
                        PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
                        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
run, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "--timeout=600", "--durations=12", "--durations-min=5"]
two = ["-n", "2", "--dist", "loadfile"] # a file's tests share what is dear to make
STAGES = dict(
    sync    = ("notebooks are clean and exported", run + ["tools/check_notebooks.py"]),
    nbdev   = ("notebook tests", run + ["tools/notebook_tests.py"]),
    docs    = ("docs site: every link and page", run + ["tools/build_docs.py", "--check"]),
    browser = ("JupyterLab and the report in a real browser", pytest + ["-m", "browser", "tests/test_browser.py"]),
    site    = ("the site in a real browser", pytest + ["-m", "browser", "-n", "2", "tests/test_site.py"]),
    pytest  = ("laws and faults", pytest + two),
)
BESIDE = dict(docs="browser") # each of the two has long waits, and one core is enough for it

def stages(
    chosen, # Names, in order
):
    "Stages that run together: most alone, some in twos."
    left = list(chosen)
    while left:
        group = [left.pop(0)]
        if left and BESIDE.get(group[0]) == left[0]: group.append(left.pop(0))
        yield group

def together(
    group, # Names
): # Of those that failed
    "Run stages side by side; the words of the first are seen as they come, those of another when it has ended."
    began = time.time()
    with ExitStack() as stack:
        words = [None] + [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in group[1:]]
        jobs = [subprocess.Popen(STAGES[n][1], cwd=root, env=env, stdout=w, stderr=w and subprocess.STDOUT) for n, w in zip(group, words)]
        for name, job, out in zip(group, jobs, words):
            code = job.wait()
            if out: out.seek(0); print(f"\n== {name}: {STAGES[name][0]}\n{out.read()}", end="", flush=True)
            print(f"== {name} {'FAILED' if code else 'ok'} in {time.time() - began:.0f} s", flush=True)
            if code: yield name

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)}; all when none is given")
    chosen = parser.parse_args().stages or list(STAGES)
    if wrong := [s for s in chosen if s not in STAGES]: parser.error(f"there is no stage '{wrong[0]}'; known: {', '.join(STAGES)}")
    began, done = time.time(), 0
    for group in stages(chosen):
        print(f"\n== {done + 1}/{len(chosen)} {group[0]}: {STAGES[group[0]][0]}" + "".join(f" (beside it: {n})" for n in group[1:]), flush=True)
        if list(together(group)): sys.exit(1)
        done += len(group)
    print(f"\nAll {len(chosen)} stages ok in {time.time() - began:.0f} s", flush=True)

if __name__ == "__main__": main()
