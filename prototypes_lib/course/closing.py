"""The last code cell of every notebook: what ran here, and the line that proves the run reached its end."""

import os
import time

from prototypes_lib.records import environment

RUN_ID = "PROTOTYPES_RUN_ID"  # the runner's environment variable: fresh for each notebook it executes


def sentinel(run_id: str) -> str:
    """The line by which `finish` tells the runner that this run, no earlier one, came to its last cell."""
    return f"run {run_id} came to its end"


def finish() -> None:
    """Prints versions, hardware, commit and wall time; neither paths nor host names. Ends every notebook."""
    import torch

    found = environment("cuda" if torch.cuda.is_available() else "cpu")
    packages = ("python", "torch", "torchvision", "timm", "numpy", "prototypes_lib")
    print("versions: " + ", ".join(f"{name} {found[name]}" for name in packages))
    print(f"hardware: {found['hardware']}, {found['platform']}")
    print(f"commit: {found['commit']}")
    print(f"wall time: {_seconds_since_start():.0f} s since the kernel started")
    if run_id := os.environ.get(RUN_ID):
        print(sentinel(run_id), flush=True)


def _seconds_since_start() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()
