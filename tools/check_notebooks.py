"Would nbdev_clean or nbdev_export change anything? Tried in a copy, so the work tree is never touched."
import shutil, subprocess, sys, tempfile, os
from pathlib import Path

root = Path(__file__).resolve().parents[1]
WATCHED = ("nbs/**/*.ipynb", "model_glue_nb/**/*.py")

def files(at):
    return {str(p.relative_to(at)): p.read_bytes() for g in WATCHED for p in at.glob(g) if ".ipynb_checkpoints" not in p.parts}

def copy(to):
    "Copy what the two commands read."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "data", "recorded")
    for folder in ("nbs", "model_glue_nb"):
        shutil.copytree(root/folder, to/folder, symlinks=True, ignore=skip)
    for file in ("settings.ini", "setup.py", "README.md", "_quarto.yml"): shutil.copy(root/file, to/file)

def main():
    with tempfile.TemporaryDirectory() as d:
        to = Path(d)/"copy"
        to.mkdir()
        copy(to)
        before, wrong = files(to), []
        for command in ("nbdev_clean", "nbdev_export"):
            done = subprocess.run([Path(sys.executable).parent/command], cwd=to, env=os.environ | {"PYTHONPATH": str(to)},
                                  text=True, capture_output=True)
            if done.returncode: sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
            after = files(to)
            wrong += [f"{command} changes {f}" for f in sorted({*before, *after}) if before.get(f) != after.get(f)]
            before = after
        if wrong:
            sys.exit("\n".join(wrong) + "\nRun nbdev_export && nbdev_clean, and commit notebook and module together.")
        print(f"{sum(f.endswith('.ipynb') for f in before)} notebooks are clean, {sum(f.endswith('.py') for f in before)} modules in sync")

if __name__ == "__main__": main()
