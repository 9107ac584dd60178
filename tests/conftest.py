"""Shapes are types: under pytest every annotated function of the library is checked by beartype."""

import importlib.util
import sys
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("prototypes_lib", "typecheck.tower")

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors of tests are small: a second thread costs more than it brings

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("ci")

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # tests share comparisons with the commands there
collect_ignore = [] if importlib.util.find_spec("lightly") else ["test_parity.py"]  # a peer, optional
