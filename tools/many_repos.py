"""How long it takes to open a pool of many Hub repositories: at first, after `kill -9`, again, locked, offline.

    PYTHONPATH=src:tests python tools/many_repos.py --repos 904 --scratch /tmp

Serves tiny adapters, a repository each, from the Hub server of the tests on this machine, so what is measured is
everything but the network and the size of the files. Every step is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hub_server import HubServer
from test_hub import write_adapter

PATTERN = "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task*"
OPEN = """
import sys, time
begin = time.perf_counter()
from logo import AdapterPool
imported = time.perf_counter()
pool = AdapterPool.open(sys.argv[1], progress=False, on_bad_adapter="skip")
print(len(pool), len(pool.refused), round(time.perf_counter() - imported, 2))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=int, default=904)
    parser.add_argument("--scratch", type=Path, default=None)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        measure(args.repos, scratch)
    finally:
        shutil.rmtree(scratch)


def measure(count: int, scratch: Path) -> None:
    repos = {}
    for number in range(count):
        folder = scratch / "made" / str(number)
        write_adapter(folder, number + 1, columns=64, weights="none" if number % 300 == 299 else "safetensors")
        repos[PATTERN.replace("*", str(number))] = folder
    with HubServer(repos) as hub:
        env = {**os.environ, **hub.env(scratch / "home"), "LOGO_CACHE": str(scratch / "logo")}
        whole = {**env, "HF_HOME": str(scratch / "other"), "LOGO_CACHE": str(scratch / "other-logo")}
        step("opened for the first time", hub, whole, PATTERN)
        killed(hub, env, count)
        step("opened after that", hub, env, PATTERN)
        step("opened again", hub, env, PATTERN)
        begin = time.perf_counter()
        manifest = str(scratch / "pool.yaml")
        lock = ["pool", "lock", PATTERN, "-o", manifest, "--on-bad-adapter", "skip"]
        done = subprocess.run([sys.executable, "-m", "logo.cli", *lock], env=env, capture_output=True, text=True)
        print(f"locked: {time.perf_counter() - begin:.1f} s, {done.stdout.strip().rpartition('/')[2]}")
        assert done.returncode == 0, done.stderr
        step("the manifest opened", hub, env, manifest)
        step("the manifest opened elsewhere", hub, {**whole, "HF_HOME": str(scratch / "third")}, manifest)
        step("the pattern opened offline", hub, {**env, "HF_HUB_OFFLINE": "1"}, PATTERN)
        step("the manifest opened offline", hub, {**env, "HF_HUB_OFFLINE": "1"}, manifest)


def step(what: str, hub: HubServer, env: dict[str, str], places: str) -> None:
    hub.clear()
    done = subprocess.run([sys.executable, "-c", OPEN, places], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adapters, refused, seconds = done.stdout.split()
    asked = sum("agent" not in request.path for request in hub.requests)
    fetched = len(hub.fetched(".safetensors"))
    print(
        f"{what}: {seconds} s, {adapters} adapters, {refused} refused, {asked} requests, {fetched} fetched", flush=True
    )


def killed(hub: HubServer, env: dict[str, str], count: int) -> None:
    """Opens the pool and ends the process with SIGKILL when two fifths are there."""
    hub.clear()
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", OPEN, PATTERN], env=env, stdout=subprocess.DEVNULL)
    while len(hub.fetched(".safetensors")) < 2 * count // 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    seconds = time.perf_counter() - begin
    print(f"killed: after {seconds:.1f} s, {len(hub.fetched('.safetensors'))} fetched", flush=True)


if __name__ == "__main__":
    main()
