"""Everything that is checked, stage by stage, stopping at the first failure.

    python tools/ci.py                 all stages
    python tools/ci.py pytest docs     only these
"""
import argparse, os, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
env = os.environ | dict(OMP_WAIT_POLICY="passive", LOKY_MAX_CPU_COUNT="1", # two test processes have both cores
                        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1",
                        PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
                        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
run, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "--timeout=600", "--durations=12", "--durations-min=5"]
STAGES = dict(
    sync    = ("notebooks are clean and exported", run + ["tools/check_notebooks.py"]),
    nbdev   = ("notebook tests", run + ["tools/notebook_tests.py"]),
    docs    = ("docs site: every link and page", run + ["tools/build_docs.py", "--check"]),
    browser = ("JupyterLab, report and site in a real browser", pytest + ["-m", "browser"]),
    pytest  = ("laws and faults", pytest + ["-n", "2", "--dist", "loadfile"]), # a file's tests share what is dear to make
)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)}; all when none is given")
    chosen = parser.parse_args().stages or list(STAGES)
    if wrong := [s for s in chosen if s not in STAGES]: parser.error(f"there is no stage '{wrong[0]}'; known: {', '.join(STAGES)}")
    began = time.time()
    for i, name in enumerate(chosen, 1):
        title, command = STAGES[name]; t = time.time()
        print(f"\n== {i}/{len(chosen)} {name}: {title}", flush=True)
        code = subprocess.run(command, cwd=root, env=env).returncode
        print(f"== {name} {'FAILED' if code else 'ok'} in {time.time() - t:.0f} s", flush=True)
        if code: sys.exit(1)
    print(f"\nAll {len(chosen)} stages ok in {time.time() - began:.0f} s", flush=True)

if __name__ == "__main__": main()
