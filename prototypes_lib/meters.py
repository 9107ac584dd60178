"""What a monitored step writes down beside its loss: the signs by which one knows whether a run is alive.

Nothing here draws a random number or changes what is trained. A row tells of the step that is just done: of its batch,
and of the networks after it.
"""

import base64
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prototypes_lib import ranks
from prototypes_lib.collapse.meter import measures_of_codes, measures_of_prototypes, void_share
from prototypes_lib.distributed import sharding
from prototypes_lib.learner import Learner, Step
from prototypes_lib.methods import Method
from prototypes_lib.objectives import entropy
from prototypes_lib.precision import wide
from prototypes_lib.regularizers import coding_rate, expansion

MOMENTUM = 0.9  # of the running marginal, from row to row
SAMPLE = 2**15  # entries of the teacher that are remembered from row to row: all of it could be gigabytes
OFTEN = 8192  # the largest K whose student's M is counted for each row; beyond, for each tenth
EPS = 0.05**0.5  # distortion of the coding rate where the method has none: SimDINO's


class Meters:
    """Makes the rows of a run; what they remember of the rows before is its `state`, which a checkpoint keeps.

    every: steps from row to row. state: of the Meters to go on from; None at the start of a run.
    """

    def __init__(self, learner: Learner, every: int, state: Mapping[str, str] | None = None):
        self.learner, self.every = learner, every
        device = next(learner.parameters()).device
        found = {name: _unpacked(text).to(device) for name, text in (state or {}).items()}
        self.marginal, self.teacher = found.get("marginal"), found.get("teacher")

    def state(self) -> dict[str, str]:
        """The running marginal and the sample of the teacher, to the bit, as text for JSON."""
        tensors = {"marginal": self.marginal, "teacher": self.teacher}
        return {name: _packed(tensor) for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def row(self, step: int, outs: list[Step]) -> dict[str, float]:
        """What is measured on the parts of step `step` (counted from 1) and on the weights after it; all ranks ask.

        Means are over parts and ranks. What a method does not have, prototypes or a teacher, no row speaks of.
        """
        rows = [{"loss": out.loss} | out.parts | out.meters for out in outs]
        means = torch.stack([torch.stack([row[k].float() for row in rows]).mean() for k in rows[0]])
        means = ranks.total(means) / ranks.world()
        row = {"step": step} | dict(zip(rows[0], means.tolist(), strict=True))
        codes = ranks.rows(torch.cat([wide(out.codes) for out in outs]))
        if self.learner.method.n_prototypes:
            row["score_max"] = max(float(out.meters["score_max"]) for out in outs)
            target = torch.stack([out.target for out in outs]).mean(0).float()
            self.marginal = target if self.marginal is None else MOMENTUM * self.marginal + (1 - MOMENTUM) * target
            row["running_marginal_entropy"] = float(entropy(self.marginal))
            row |= self._of_prototypes(codes, student=len(target) <= OFTEN or not step % (10 * self.every))
        of_codes = measures_of_codes(codes, eps=distortion(self.learner.method))
        row |= {name: value for name, value in of_codes.items() if math.isfinite(value)} | self._of_teacher()
        return row | {"weight_max": _largest(self.learner.student.parameters())}

    def _of_prototypes(self, codes: Tensor, student: bool) -> dict[str, float]:
        teacher = self.learner.teacher
        others = {"M_patches": teacher.patch_prototypes}
        others |= {"M_student": self.learner.student.prototypes} if student else {}
        w = sharding.whole(teacher.prototypes.w)
        row = measures_of_prototypes(w)
        row |= {n: measures_of_prototypes(sharding.whole(p.w))["M"] for n, p in others.items() if p is not None}
        counts = {name: int(row[name]) for name in ("k", "M", *others) if row.get(name)}  # 0 where w is not finite
        void = void_share(w, codes)
        kappa = {name: value for name, value in row.items() if name.startswith("kappa")}
        return counts | kappa | ({} if void is None else {"void": void})

    def _of_teacher(self) -> dict[str, float]:
        """How far the teacher has moved since the row before, and is behind the student; whether it is the student."""
        method, student = self.learner.method, dict(self.learner.student.named_parameters())
        ours = ("prototypes.", "patch_prototypes.") if method.shared_prototypes else ()  # meant to be the student's
        pairs = [(t, student[n]) for n, t in self.learner.teacher.named_parameters() if not n.startswith(ours)]
        if method.ema is None:
            return {}
        before, self.teacher = self.teacher, _sample([t for t, _ in pairs])
        row = {"teacher_lag": _norm(t - s for t, s in pairs) / max(_norm(s for _, s in pairs), 1e-30)}
        if before is not None:
            row["teacher_moved"] = float((self.teacher - before).norm() / self.teacher.norm().clamp_min(1e-30))
        shared = {_storage(t) for t, _ in pairs} & {_storage(s) for _, s in pairs} - {0}
        return row | {"shared_memory": float(bool(shared))}


def distortion(method: Method) -> float:
    """The eps of the method's own coding rate, or SimDINO's."""
    terms = [f for _, f, _ in method.regularizers if getattr(f, "func", f) in (coding_rate, expansion)]
    found = [f.keywords.get("eps") for f in terms if hasattr(f, "keywords")]
    return next((eps for eps in found if isinstance(eps, float)), EPS)


def grad_norm(student: torch.nn.Module) -> float:
    """The norm of the student's gradients, all as one vector; all ranks ask."""
    return _norm(p.grad for p in student.parameters() if p.grad is not None)


@torch.no_grad()
def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [sharding.whole(torch.linalg.vector_norm(tensor.detach())).double() for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _largest(parameters: Iterable[Tensor]) -> float:
    """The largest absolute entry on any rank."""
    sizes = torch._foreach_norm([x for x in map(_local, parameters) if x.numel()], torch.inf)
    return float(ranks.largest(torch.stack([size.float() for size in sizes]).amax()))


def _storage(parameter: Tensor) -> int:
    return _local(parameter).untyped_storage().data_ptr()


def _sample(tensors: list[Tensor]) -> Tensor:
    """About SAMPLE entries of all tensors together, always the same ones; all where there are no more."""
    stride = max(1, sum(tensor.numel() for tensor in tensors) // SAMPLE) | 1  # odd: no single column of a matrix
    return torch.cat([sharding.whole(tensor.detach()).flatten()[::stride].float() for tensor in tensors])


def _packed(tensor: Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
