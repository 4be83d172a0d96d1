"""Every notebook, run as nbdev_test runs it, the longest first: walkthroughs, then from the last stage to the first.

nbdev_test goes by the alphabet, so that the walkthroughs come last and one of two workers waits for the other."""
import sys
from pathlib import Path
from fastcore.parallel import parallel
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

def in_order(files):
    "Walkthroughs first, then the stages from the last to the first."
    return sorted(files, key=lambda f: (f.parent.name == "tutorials", f.parent.name, f.name), reverse=True)

def named(file): return f"{file.parent.name}/{file.stem}" # two stages may each have a room of one name

def main():
    config = get_config()
    files = in_order(f.absolute() for f in nbglob(as_path=True))
    with working_directory(config.nbs_path):
        done = parallel(test_nb, files, skip_flags=config.tst_flags.split(), basepath=config.config_path, n_workers=2, pause=.01)
    slowest = sorted(zip(done, files), key=lambda x: -x[0][1])
    print(f"{len(files)} notebooks; the slowest: " + ", ".join(f"{named(f)} {s:.0f} s" for (_, s), f in slowest[:12]))
    failed = [named(f) for (passed, _), f in slowest if not passed]
    if failed: sys.exit(f"{len(failed)} notebooks failed: {', '.join(failed)}")

if __name__ == "__main__": main()
