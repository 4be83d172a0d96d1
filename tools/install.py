"Make .venv with everything in it: quiet, repeatable, and going on after a break. Standard library only."
import csv, shutil, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
venv, python, stamp, busy = root/".venv", root/".venv/bin/python", root/".venv/.installed", root/".venv/.installing"
PARTS = "import torch, transformers, lm_eval, numba, pandas, plotly, ipywidgets, jupyterlab, nbdev, pytest, playwright, fastapi, uvicorn, openai, model_glue_nb"

def say(text): print(f"install: {text}", flush=True)

def pip(*args):
    "Run pip in .venv; its words are shown only when it fails. Python compiles what it imports when it imports it: half the time here."
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore", *args]
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\ninstall: pip failed, see above. Repair that and run the same command again; it continues from here.")

def make_venv():
    "A virtual environment whose pip answers."
    alive = python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if alive: return
    if sys.version_info < (3, 11):
        sys.exit(f"install: Python {sys.version.split()[0]} came, 3.11 or newer is wanted. Say which: make install PYTHON=python3.11")
    say(f"a virtual environment in .venv (Python {sys.version.split()[0]})")
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)

def torn():
    "Packages that an interrupted installation left with files missing."
    for info in venv.glob("lib/python*/site-packages/*.dist-info"):
        name, version = info.name.removesuffix(".dist-info").rsplit("-", 1)
        record = info/"RECORD"
        if not record.exists(): # pip forgets it and installs it again
            shutil.rmtree(info)
            continue
        with open(record, newline="") as f: files = [row[0] for row in csv.reader(f) if row]
        if not all((info.parent/p).exists() for p in files if not p.endswith(".pyc")):
            yield f"{name}=={version}"

def repair():
    "After a break: install again what is incomplete."
    broken = [p for p in torn() if not p.startswith("model_glue_nb==")]
    if not broken: return
    say(f"the last installation was interrupted; again: {', '.join(broken)}")
    pip("--force-reinstall", "--no-deps", *broken)

def main():
    began = time.time()
    make_venv()
    if busy.exists(): repair()
    busy.touch()
    say("PyTorch, the largest part")
    pip("-c", "constraints.txt", "torch")
    say("model_glue_nb and what it needs, at the tested versions")
    pip("-c", "constraints.txt", "-e", ".[dev]")
    if subprocess.run([python, "-c", PARTS], cwd=root).returncode:
        sys.exit("install: a package cannot be imported, see above. Remove .venv and run the same command again.")
    if (root/".git").exists():
        subprocess.run([venv/"bin/nbdev_install_hooks"], cwd=root, stdout=subprocess.DEVNULL)
    busy.unlink()
    stamp.touch()
    say(f"done in {time.time() - began:.0f} s")

if __name__ == "__main__": main()
