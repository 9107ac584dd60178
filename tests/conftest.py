"""Shapes are types: under pytest every annotated function of the library is checked by beartype."""

from jaxtyping import install_import_hook

install_import_hook("prototypes_lib", "typecheck.tower")

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors of tests are small: a second thread costs more than it brings

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("ci")
