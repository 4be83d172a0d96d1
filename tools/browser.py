"A Chromium for the browser tests: the one that is there, or Debian's when we may install it."
import os, shutil, subprocess

def find():
    "Path of a Chromium or Chrome, or None."
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)

def main():
    if find(): return
    if os.getuid() or not shutil.which("apt-get"):
        print("browser: no Chromium was found and it cannot be installed from here; the browser stage will say so.")
        return
    print("browser: installing Debian's chromium", flush=True)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    subprocess.run(["apt-get", "update"], **quiet)
    done = subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "chromium"], **quiet)
    if done.returncode: print("browser: chromium could not be installed; the browser stage will say so.")

if __name__ == "__main__": main()
