"""What the meters of a run mean, in words."""

import math
from dataclasses import dataclass

from prototypes_lib.collapse.unique import UniquePrototypes


@dataclass(frozen=True)
class Verdict:
    """`kind` is uniform, one-hot, constant, partial, healthy or diverged; `text` says it in words with the figures."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(
    *,
    loss: float,
    k: int,
    teacher_entropy: float,
    kl: float | None = None,
    unique: int | UniquePrototypes | None = None,
    marginal_entropy: float | None = None,
) -> Verdict:
    """What the meters of a run mean (Sim, Eqs. 18-21; PPC, section 4).

    loss = KL + teacher entropy, so a loss that sits at ln K with an entropy of ln K has learned nothing (every target
    is uniform), and a loss near zero with a marginal of entropy zero has one class for everything. Whatever its shape,
    a target that is the same for all images has a marginal entropy equal to the teacher's: they differ by the mutual
    information of image and prototype. A low KL proves neither success nor collapse. M below half of K is partial
    prototype collapse.

    Args: loss and teacher_entropy in nats, means over samples; kl defaults to their difference; unique is M;
    marginal_entropy the entropy of the mean of the same targets. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: a verdict needs at least one prototype")
    ceiling = math.log(k)
    kl = loss - teacher_entropy if kl is None else kl
    count = unique.count if isinstance(unique, UniquePrototypes) else unique
    figures = f"loss {loss:.3f} against ln K = {ceiling:.3f}, teacher entropy {teacher_entropy:.3f}, KL {kl:z.3f}"
    if marginal_entropy is not None:
        figures += f", marginal entropy {marginal_entropy:.3f}"
    if count is not None:
        figures += f", M = {count} of K = {k}"
    if not all(map(math.isfinite, (loss, teacher_entropy, kl, marginal_entropy or 0.0))):
        return Verdict("diverged", f"The loss is not finite: the run has diverged ({figures}).")
    if k == 1:
        return Verdict("one-hot", f"A single prototype takes all images by construction ({figures}).")
    if teacher_entropy > 0.99 * ceiling:
        if abs(loss - ceiling) < 0.01 * ceiling:
            text = "Collapsed to uniform: every target is 1/K, the loss stands at ln K and its KL part teaches nothing"
        else:
            text = "The teacher says 1/K for every image: lower its temperature or look at the centering"
        return Verdict("uniform", f"{text} ({figures}).")
    if marginal_entropy is not None and marginal_entropy < 0.05 * ceiling:
        return Verdict("one-hot", f"Collapsed to one class: one prototype takes all images ({figures}).")
    if marginal_entropy is not None and abs(marginal_entropy - teacher_entropy) < 0.01 * ceiling:
        return Verdict("constant", f"Collapsed to one answer: every image gets the same target ({figures}).")
    if marginal_entropy is None and loss < 0.01 * ceiling:
        text = "The loss is near zero: one prototype takes all images, or the views are no challenge; see the marginal"
        return Verdict("one-hot", f"{text} ({figures}).")
    if count is not None and count < 0.5 * k:
        copies = k / max(count, 1)
        text = f"Partial prototype collapse: {copies:.1f} copies of each unique prototype on average"
        return Verdict("partial", f"{text}; KoLeo-proto spreads them ({figures}).")
    waiting = ", but the student still answers 1/K" if abs(loss - ceiling) < 0.01 * ceiling else ""
    return Verdict("healthy", f"No collapse to be seen{waiting} ({figures}).")
