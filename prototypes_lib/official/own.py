"""Prototypes out of this library's own runs and exports, told in the same words as other people's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prototypes_lib.official.heads import Found, made


def sets(path: Path, method: Mapping[str, Any], tensors: Mapping[str, Tensor], exported: bool) -> tuple[Found, ...]:
    """Every set of prototypes among a run's tensors, or an export's; the teacher's crops' first.

    method: as the run's config has it. What teacher and student share is told once, as the teacher's, with a note.

    Raises ValueError for a method without prototypes, and for prototypes that are not finite or zero.
    """
    score = method["score"]  # a name, or a partial function's
    unit = method.get("renormalize") or (score if isinstance(score, str) else score["name"]) == "scores.cosine"
    owners = {"": "teacher"} if exported else {"teacher.": "teacher", "student.": "student"}
    found = {}
    for owner, network in owners.items():
        for of, patch in (("crops", ""), ("patches", "patch_")):
            name = f"{patch}last_layer" if exported else f"{owner}{patch}prototypes"
            if f"{name}.weight_v" in tensors:
                parts = {part: (f"{name}.{part}", tensors[f"{name}.{part}"]) for part in ("weight_g", "weight_v")}
                found[network, of] = (*made(path, parts), f"{name}.weight_v")
    if not found:
        raise ValueError(f"{path}: this method has no prototypes (SimDINO, for example)")
    sets = []
    for (network, of), (w, notes, tensor) in found.items():
        if network == "student" and ("teacher", of) not in found:
            network, notes = "teacher", [*notes, "teacher and student share these prototypes"]
        if of == "crops" and method.get("patch") and (network, "patches") not in found:
            head = method["patch"]["head"]
            notes = [*notes, "patches share these prototypes"] if head in ("shared", "prototypes") else notes
        layout, dtype = f"{'export' if exported else 'run'} of this library", str(tensors[tensor].dtype)
        kind = "cosine" if unit else "dot"
        sets.append(Found(w, network, of, layout, tensor, dtype.removeprefix("torch."), kind, tuple(notes)))
    return tuple(sets)
