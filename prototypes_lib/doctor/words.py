"""The doctor's verdict in plain language: one sentence on how many prototypes there are, then what else stands out."""

from prototypes_lib.doctor.data import DataExamination
from prototypes_lib.doctor.examination import PPC, VMF, Examination, quantiles

KINDS = ("full", "partial", "some", "none")  # collapse of the prototypes: M = 1, M < K / 2, M < 0.95 K, the rest
_NAMED = {
    "full": "full prototype collapse",
    "partial": "partial prototype collapse",
    "some": "some copies, no collapse",
    "none": "no prototype collapse",
}


def kind(seen: Examination) -> str:
    """Which of KINDS; below half of K is partial collapse, as `collapse.verdict` has it."""
    if seen.unique.count == 1 and seen.k > 1:
        return "full"
    return "partial" if seen.unique.share < 0.5 else "some" if seen.unique.share < 0.95 else "none"


def verdict(seen: Examination) -> str:
    """The first sentence: "961 of 8,192 prototypes are unique (11.7 %): partial prototype collapse"."""
    m, share = seen.unique.count, 100 * seen.unique.share
    are = "is" if m == 1 else "are"
    text = f"{m:,} of {seen.k:,} prototypes {are} unique ({share:.3g} %): {_NAMED[kind(seen)]}"
    if seen.largest > 1:
        text += f"; the largest group of copies has {seen.largest:,} ({100 * seen.largest / seen.k:.3g} %)"
    return text + "."


def remarks(seen: Examination, data: DataExamination | None = None) -> list[str]:
    """What else a person should know, a sentence each: how sure M is, what the groups are, and what to try."""
    low, high = seen.order_range
    (ppc, _), (vmf, _) = seen.at(PPC), seen.at(VMF)
    told = []
    if low == high == seen.unique.count:
        told.append(f"M does not depend on the order in which prototypes are counted ({seen.orders} orders tried).")
    else:
        told.append(
            f"Counted in other orders M is {low:,} to {high:,} ({seen.orders} random ones); if copies of copies count "
            f"as copies, {seen.components:,} groups remain."
        )
    if max(ppc, vmf) > 1.2 * min(ppc, vmf):
        told.append(f"The threshold matters: {ppc:,} at 1 - cos < {PPC} (PPC), {vmf:,} at cos > {1 - VMF:g} (vMF).")
    told += _length_words(seen) + _apart(seen)
    if seen.other is not None:
        middle = quantiles(seen.other.cosine)["0.5"]
        told.append(
            f"The {seen.other.network} has {seen.other.count:,} unique prototypes; the cosine of a prototype with the "
            f"same one there is {middle:.3f} at the median."
        )
    told += _of_data(seen, data) if data is not None else _without(seen)
    if kind(seen) in ("full", "partial"):
        told.append(
            "What to try: KoLeo on the prototypes (PPC; prototypes train dino-vmf-kp) keeps them apart; or start "
            f"with fewer: {seen.k:,} here do the work of {seen.unique.count:,}."
        )
    return told


def _length_words(seen: Examination) -> list[str]:
    at = quantiles(seen.lengths)
    if at["1"] - at["0"] <= 1e-4 * at["1"]:
        return [f"All prototypes have one length, {at['0.5']:.3g}: precision tells nothing about them."]
    told = "; the temperature that makes it vMF's kappa is not in the file"
    if seen.tau:
        told = f"; over tau = {seen.tau:g} kappa is {at['0.05'] / seen.tau:.3g} to {at['0.95'] / seen.tau:.3g}"
    return [f"Lengths |w| are {at['0.05']:.3g} to {at['0.95']:.3g} (5 % to 95 %){told}."]


def _apart(seen: Examination) -> list[str]:
    if seen.nearest is None or seen.uniform is None:
        return []
    ours, even = quantiles(seen.nearest)["0.5"], quantiles(seen.uniform)["0.5"]
    text = f"The nearest other prototype is at 1 - cos = {max(ours, 0):.3g} at the median, {even:.3g} for random points"
    word = "as far apart as random points" if 0.9 < ours / even < 1.1 else "closer" if ours < even else "more spread"
    return [f"{text} on the sphere: {word}."]


def _without(seen: Examination) -> list[str]:
    if seen.largest < max(0.1 * seen.k, 2):
        return ["No group of copies is large enough to be taken for a void set."]
    return [
        f"The group around prototype {seen.largest_of} may be a void set, which no image uses (vMF, section 5.2): "
        "--data FOLDER would tell."
    ]


def _of_data(seen: Examination, data: DataExamination) -> list[str]:
    told = [
        f"{data.n:,} {'image uses' if data.n == 1 else 'images use'} {data.used:,} of {seen.k:,} prototypes "
        f"({data.used_unique:,} of {seen.unique.count:,} where only the unique ones compete)."
    ]
    if data.used < min(seen.k, data.n) / 20:
        told.append("Few prototypes take all images: look at the marginal and at the teacher's centering.")
    if data.void is None:
        told.append("The codes average to zero, so nothing lies opposite to them: no void set.")
    elif not data.void.count:
        told.append("There is no void set: no prototype points away from the mean of the data.")
    else:
        inside = int(data.held[data.void.mask].sum())
        told.append(
            f"The void set has {data.void.count:,} prototypes ({100 * data.void.count / seen.k:.3g} %), which point "
            f"away from the mean of the data; {inside:,} image{'s' * (inside != 1)} {'is' if inside == 1 else 'are'} "
            "assigned to them."
        )
    return told


def lines(seen: Examination) -> list[str]:
    """The main numbers as the terminal shows them."""
    low, high = seen.order_range
    at, found = quantiles(seen.lengths), seen.found
    where = found.network if found.of == "crops" else f"{found.network}, {found.of}"
    told = [
        f"K = {seen.k} prototypes of dimension {found.w.shape[1]} ({where})",
        f"M = {seen.unique.count} unique at 1 - cos < {seen.eps:g} ({seen.unique.share:.1%} of K), index order",
        f"    other orders give {low} to {high}; {seen.components} connected components",
    ]
    for eps, reading in ((PPC, "PPC"), (VMF, "vMF, Table 4: cos > 0.9")):
        if eps != seen.eps:
            count, largest = seen.at(eps)
            told.append(f"    {count} at 1 - cos < {eps:g} ({reading}), largest group {largest}")
    told += [
        f"largest group of copies: {seen.largest}",
        f"lengths |w|: {at['0']:.3f} to {at['1']:.3f}, median {at['0.5']:.3f}",
        f"effective rank {seen.effective_rank:.1f} of {len(seen.eigenvalues)}, coding rate {seen.coding_rate:.1f} nats",
    ]
    if seen.other is not None:
        middle = quantiles(seen.other.cosine)["0.5"]
        told.append(
            f"{seen.other.network}: M = {seen.other.count}, cosine of matching prototypes {middle:.4f} (median)"
        )
    return told
