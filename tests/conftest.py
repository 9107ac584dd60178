"""Shapes are types: under pytest every annotated function of the library is checked by beartype."""

import importlib
import importlib.util
import sys
from pathlib import Path

for name in ("timm", "scipy.stats", "scipy.optimize", "torchvision.datasets", "matplotlib.pyplot"):
    importlib.import_module(name)  # what is first imported under the hook is compiled anew, without the kept byte-code

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("prototypes_lib", "typecheck.tower")

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors of tests are small: a second thread costs more than it brings

always = hypothesis.settings(derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("whole", always, max_examples=50)
hypothesis.settings.register_profile("fast", always, max_examples=15)


def pytest_configure(config):
    """Fewer examples where the slow tests are left out."""
    hypothesis.settings.load_profile("fast" if "not slow" in config.option.markexpr else "whole")


sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # tests share comparisons with the commands there
collect_ignore = [] if importlib.util.find_spec("lightly") else ["test_parity.py"]  # a peer, optional
