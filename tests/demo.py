"""`make demo`: from nothing to a lab with a dataset and a run; the server is deleted; the run is there again.

Every part is real: an OpenStack in a container, a server, a volume, PostgreSQL, an S3 server, MLflow, Jupyter.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import yaml
from story import LABCTL, REPOSITORY, Commands, Evidence, Timeline, delete_server_behind_labctl

#: The sandbox's gateway: this machine, as its servers see it.
DATASET_ADDRESS = "172.29.0.1"
DATASET_PORT = 8099
NOTEBOOK = "food11_demo.ipynb"


def main() -> int:
    """Tell the story; 0 when the run came back with the very same artifacts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=1100, help="images in the dataset (the real one has 16643)")
    count = options.parse_args().images
    directory = REPOSITORY / "build" / "demo"
    directory.mkdir(parents=True, exist_ok=True)
    lab = Commands(directory)
    timeline = Timeline()

    archive = directory / "Food-11.zip"
    making = threading.Thread(target=make_dataset, args=(archive, count))
    making.start()
    with timeline.part("sandbox up"):
        subprocess.run([str(LABCTL), "sandbox", "up"], check=True)
    making.join()

    write_lab(lab, archive)
    with serve_dataset(archive):
        with timeline.part("labctl up"):
            lab.run("up")
        with timeline.part("labctl etl (extract, transform, load)"):
            lab.run("etl")
    with timeline.part("the demo notebook, headless"):
        run_notebook(lab)
    before = Evidence.collect(lab)
    print(f"MLflow has {len(before.runs)} run(s) {before.runs}, {len(before.artifacts)} artifact files.", flush=True)
    if not before.runs or not before.artifacts:
        raise SystemExit("The notebook logged no run or no artifact.")

    with timeline.part("the server is deleted behind labctl's back"):
        delete_server_behind_labctl("node-persist-demo")
    with timeline.part("labctl rebuild"):
        lab.run("rebuild")
    with timeline.part("reading everything back"):
        lost = before.lost(Evidence.collect(lab))
    print(f"\n{timeline.table()}\n")
    if lost:
        print(f"LOST: {lost}")
        return 1
    print(f"All {len(before.runs)} run(s) and {len(before.artifacts)} artifact files are there again, byte for byte.")
    print(f"The lab is still up: cd {directory.relative_to(REPOSITORY)}; labctl status. make clean removes everything.")
    return 0


def make_dataset(archive: Path, count: int) -> None:
    """A Food-11-shaped archive of real JPEGs, unless the last demo made one of that size."""
    if archive.exists() and archive.with_suffix(".count").read_text() == str(count):
        return
    generator = str(REPOSITORY / "tests" / "food11.py")
    subprocess.run([sys.executable, generator, "make", str(archive), "--images", str(count)], check=True)
    archive.with_suffix(".count").write_text(str(count))


def write_lab(lab: Commands, archive: Path) -> None:
    """A lab.yaml whose dataset is the generated one."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    document = {
        "lab": "demo",
        "site": "sandbox",
        "dataset": {
            "name": "food11",
            "url": f"http://{DATASET_ADDRESS}:{DATASET_PORT}/{archive.name}",
            "sha256": digest,
            "classes": 11,
            "splits": ["training", "validation", "evaluation"],
        },
    }
    (lab.directory / "lab.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


class serve_dataset:
    """Serve the archive over HTTP to the sandbox's servers while it is needed."""

    def __init__(self, archive: Path) -> None:
        generator = str(REPOSITORY / "tests" / "food11.py")
        self.command = [sys.executable, generator, "serve", str(archive)]
        self.command += ["--address", DATASET_ADDRESS, "--port", str(DATASET_PORT)]

    def __enter__(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


def run_notebook(lab: Commands) -> None:
    """Execute the notebook in the Jupyter container, as a user's Run All would."""
    container = "jupyter"
    print(
        lab.ssh(
            f"sudo docker exec {container} jupyter nbconvert --to notebook --execute --stdout"
            f" --log-level WARN {NOTEBOOK} | tail -c 300"
        )[-300:]
    )


if __name__ == "__main__":
    sys.exit(main())
