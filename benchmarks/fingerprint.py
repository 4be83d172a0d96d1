"""Fingerprints of whole files against plain reading, side by side in one run; and edits that must be noticed.

    python benchmarks/fingerprint.py [--gb 2.2] [--rounds 5] [--edits 1000] [--mb 64] [--out FILE.csv]

`first` is a pass over a file that nothing is known of; `read` is the same bytes read by one thread into one buffer. Both find the file in the page cache, and
take turns: `of_reading` is the median of the rounds' ratios. `second_ms` is a later process's fingerprint of the same model. Each edit overwrites 1 byte to 20 kB
at a random place of a member with random bytes, and its fingerprint is asked anew."""
import argparse, os, random, statistics, sys, tempfile, time
from pathlib import Path

from common import record, run, show

SECOND = """
import sys, time
from pathlib import Path
from model_glue_nb.checkpoints.checkpoint import ZooModel
start = time.perf_counter(); print(ZooModel("m", Path(sys.argv[1])).fingerprint()); print("WORK", time.perf_counter() - start)
"""

def write_member(folder, n_bytes):
    "A member with one tensor of random bytes."
    import json, struct
    folder.mkdir()
    head = json.dumps({"w": dict(dtype="U8", shape=[n_bytes], data_offsets=[0, n_bytes])}).encode()
    with open(folder/"model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for _ in range(n_bytes // 2**20): f.write(os.urandom(2**20))
        f.write(os.urandom(n_bytes % 2**20))
    (folder/"config.json").write_text("{}")
    return folder

def read(file, buffer):
    with open(file, "rb", buffering=0) as f:
        while f.readinto(buffer): pass

def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start

def unnoticed(folder, n_edits):
    "How many random edits leave the fingerprint as it was."
    from model_glue_nb.checkpoints.checkpoint import ZooModel
    model, file, rng = ZooModel("m", folder), folder/"model.safetensors", random.Random(0)
    size, seen, missed = file.stat().st_size, model.fingerprint(), 0
    for _ in range(n_edits):
        n = rng.choice([1, rng.randint(2, 20_000)])
        at = rng.randrange(200, size - n)
        with open(file, "r+b") as f:
            f.seek(at)
            was = f.read(n)
            new = rng.randbytes(n)
            if new == was: new = bytes([was[0] ^ 1]) + new[1:]
            f.seek(at)
            f.write(new)
        now = model.fingerprint()
        missed += now == seen
        seen = now
    return missed

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=2.2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", help="CSV file")
    p.add_argument("--edits", type=int, default=1000)
    p.add_argument("--mb", type=int, default=64)
    a = p.parse_args()
    from model_glue_nb.checkpoints.content import hash_file
    with tempfile.TemporaryDirectory() as d:
        os.environ["XDG_CACHE_HOME"] = d + "/cache"
        folder = write_member(Path(d)/"m", int(a.gb * 1e9))
        file, buffer = folder/"model.safetensors", bytearray(2**20)
        read(file, buffer)
        rounds = [(seconds(read, file, buffer), seconds(hash_file, file)) for _ in range(a.rounds)]
        time.sleep(3)
        run(sys.executable, SECOND, folder)
        second = min(run(sys.executable, SECOND, folder)[1] for _ in range(3))
        missed = unnoticed(write_member(Path(d)/"edited", a.mb * 2**20), a.edits)
        row = dict(gb=a.gb,
                   read_gb_s=a.gb / statistics.median(r[0] for r in rounds),
                   first_gb_s=a.gb / statistics.median(r[1] for r in rounds),
                   of_reading=statistics.median(r[0] / r[1] for r in rounds),
                   second_ms=1e3 * second, edits=a.edits,
                   unnoticed=missed, load=os.getloadavg()[0])
    show(row)
    record([row], a.out)

if __name__ == "__main__": main()
