"""The claims of the three papers that a record could decide, in our words, and which record decides each."""

import math
from typing import Any

from prototypes_lib.scoreboard.claims import (
    Claim,
    Test,
    at,
    fixed,
    information,
    knn,
    less,
    lift,
    mean_more,
    more,
    runs,
    share,
)
from prototypes_lib.scoreboard.paper import KNN, LINEAR, qualified

FEW, TRANSFERRED = "few-shot top-1 (%)", "linear accuracy (%)"
BASE, KD, KP = "ibot-vmf", "ibot-vmf-kd", "ibot-vmf-kp"  # in 52, 80, 84
LAPSE, LAPSE_KD, LAPSE_KP = "dino-vmf-k512", "dino-vmf-kd-k512", "dino-vmf-kp-k512"  # in 56, with k128 and k2048 too
HALF, KEPT = 0.5, 0.9  # partial collapse is M < K/2 (collapse.verdict); the least M/K that PPC prints for kp is 0.92
COLLAPSED = 0.01  # of ln K: targets that say less of the image are the same for all (collapse.verdict)
P, T2, T3 = "iBOT-vMF (kp)", "Table 2", "Table 3"


_KNN = "prototypes evaluate knn RUN --data PATH"
_TRANSFER = "prototypes evaluate transfer RUN --data NAME --folds 5 for each data set"


def _paper_run(*names: str, then: str = "") -> str:
    """The trainings of paper runs, and what follows on each."""
    trained = " && ".join(
        f"prototypes train --paper-run {n}{'' if n.endswith('-inat') else ' --data PATH'}" for n in names
    )
    return f"{trained}; on each: {then}" if then else trained


def _on_balanced(metric: str, a: str, b: str, lapse: tuple[str, str] | None = None) -> tuple[Test, ...]:
    """The equal budget of 80 first, then the time-lapse of 56 (DINO-vMF), then the 200 steps of 52."""
    lapsed = (Test("56_", more(metric, *lapse)),) if lapse else ()
    return (Test("80_", more(metric, a, b)), *lapsed, Test("52_", more(metric, a, b)))


def _of_m(base: str, lapse: str, bound: float, sign: float) -> tuple[Test, ...]:
    """M / K above (sign 1) or below (sign -1) a bound: the record made to look at M, then ordinary settings."""
    where = (("56_", lapse), ("80_", base), ("84_", base), ("52_", base))
    return tuple(Test(name, fixed(bound, runs(share, run), sign), "of K") for name, run in where)


def _doublings(run: dict[str, Any]) -> float:
    return math.log2(run["last"]["M"])


PPC = (
    Claim("PPC", "section 4, Table 1", "Without KoLeo-proto prototypes collapse in part: M is below half of K",
          _of_m(BASE, "dino-vmf-k2048", HALF, -1)),
    Claim("PPC", "section 6.1, Fig. 3 left", "KoLeo-proto at weight 0.1 keeps M = K (at least 0.9 K)",
          _of_m(KP, "dino-vmf-kp-k2048", KEPT, 1)),
    Claim("PPC", "Fig. 3 left", "KoLeo-data does not: M stays below half of K",
          _of_m(KD, "dino-vmf-kd-k2048", HALF, -1)),
    Claim("PPC", "section 6.1, Fig. 3 left", "The baseline's M does not depend on K (within a quarter)",
          (Test("56_", less(runs(_doublings, "dino-vmf-k2048"), runs(_doublings, "dino-vmf-k128")),
                "doublings, of K's four", math.log2(1.25)),)),
    Claim("PPC", "section 4, Fig. 2", "Prototypes with more copies get more data once only unique ones compete",
          tuple(Test("56_", runs(at("usage.ranks.0"), f"dino-vmf-k{k}"), "rank correlation") for k in (512, 2048))),
    Claim("PPC", "section 4, Fig. 1", "The marginal over unique prototypes is less uniform than over all",
          (Test("56_", less(runs(at("usage.even.0"), LAPSE), runs(at("usage.even.1"), LAPSE)), "of ln K"),)),
    Claim("PPC", "section 6.1, Fig. 3 right", "The baseline's accuracy does not depend on K (within 0.4 points)",
          (Test("56_", more(KNN, "dino-vmf-k2048", "dino-vmf-k128"), margin=0.4),)),
    Claim("PPC", "section 6.1, Fig. 3 right", "With KoLeo-proto more prototypes give better kNN",
          (Test("56_", more(KNN, "dino-vmf-kp-k2048", "dino-vmf-kp-k128")),)),
    Claim("PPC", "section 6.1, Fig. 3 right", "With KoLeo-data more prototypes give better kNN",
          (Test("56_", more(KNN, "dino-vmf-kd-k2048", "dino-vmf-kd-k128")),)),
    Claim("PPC", "section 6.1, Fig. 3 right", "KoLeo-data is worse than the baseline in kNN",
          _on_balanced(KNN, BASE, KD, (LAPSE, LAPSE_KD))),
    Claim("PPC", "Fig. 3 right", "KoLeo-proto is better than KoLeo-data in kNN",
          _on_balanced(KNN, KP, KD, (LAPSE_KP, LAPSE_KD))),
    Claim("PPC", "section 6.2, Table 2", "KoLeo-proto gains in kNN, marginally",
          _on_balanced(KNN, KP, BASE, (LAPSE_KP, LAPSE)), pairs=((T2, P, "iBOT-vMF", KNN),)),
    Claim("PPC", "section 6.2, Table 2", "KoLeo-proto gains in linear classification, marginally",
          (Test("80_", more(LINEAR, KP, BASE)),), pairs=((T2, P, "iBOT-vMF", LINEAR),)),
    Claim("PPC", "section 6.2, Table 2", "KoLeo-proto gains in few-shot classification (mean of the settings)",
          (Test("80_", mean_more(FEW, KP, BASE)),),
          pairs=tuple((T2, P, "iBOT-vMF", qualified(FEW, images=n)) for n in ("1%", "5/class", "2/class", "1/class"))),
    Claim("PPC", "section 6.2, Table 2", "KoLeo-proto's few-shot gain is larger than its kNN gain",
          (Test("80_", less(mean_more(FEW, KP, BASE), more(KNN, KP, BASE))),)),
    Claim("PPC", "section 6.2, Table 2", "On balanced data KoLeo-proto costs transfer (mean of the data sets)",
          (Test("82_", mean_more(TRANSFERRED, BASE, KP)),),
          _paper_run("ibot-vmf-kp-vitb16", "ibot-vmf-vitb16", then=_TRANSFER)),
    Claim("PPC", "section 6", "Probability centering is better in kNN than Sinkhorn",
          (Test("56_", more(KNN, LAPSE, "dino-vmf-sinkhorn-k512")),)),
    Claim("PPC", "section 6", "Probability centering is better in kNN than mean entropy",
          (Test("56_", more(KNN, LAPSE, "dino-vmf-me-k512")), Test("52_", more(KNN, BASE, "ibot-vmf-me")))),
    Claim("PPC", "section 6.3, Table 3", "Long tail: KoLeo-proto gains in linear classification",
          (Test("84_", more(LINEAR, KP, BASE)),), pairs=((T3, f"{P} [pretrain=iNat-2018]",
          "iBOT-vMF [pretrain=iNat-2018]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: KoLeo-data gains in linear classification (ViT-S)",
          (Test("84_", more(LINEAR, KD, BASE)),), pairs=((T3, "iBOT-vMF (kd) [pretrain=iNat-2018]",
          "iBOT-vMF [pretrain=iNat-2018]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: KoLeo-proto is better than KoLeo-data in linear classification",
          (Test("84_", more(LINEAR, KP, KD)),), pairs=((T3, f"{P} [pretrain=iNat-2018]",
          "iBOT-vMF (kd) [pretrain=iNat-2018]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: iBOT-vMF is far better than MSN in linear classification",
          (Test("84_", more(LINEAR, BASE, "msn")),), pairs=((T3, "iBOT-vMF [pretrain=iNat-2018]",
          "MSN [pretrain=iNat-2018; lambda=1]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: iBOT-vMF is far better than PMSN in linear classification",
          (Test("84_", more(LINEAR, BASE, "pmsn")),), pairs=((T3, "iBOT-vMF [pretrain=iNat-2018]",
          "PMSN [pretrain=iNat-2018; lambda=5]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: a uniform prior (MSN) beats a power law (PMSN), linear",
          (Test("84_", more(LINEAR, "msn", "pmsn")),), pairs=((T3, "MSN [pretrain=iNat-2018; lambda=1]",
          "PMSN [pretrain=iNat-2018; lambda=5]", LINEAR),)),
    Claim("PPC", "section 6.3, Table 3", "Long tail: KoLeo-proto does not cost transfer, it gains", (),
          _paper_run("ibot-vmf-kp-vits16-inat", "ibot-vmf-vits16-inat", then=_TRANSFER)),
    Claim("PPC", "Tables 2, 3", "Fine-tuned, KoLeo-proto is on par with the baseline", (),
          _paper_run("ibot-vmf-kp-vits16", "ibot-vmf-vits16", then="prototypes evaluate fine-tune RUN --data PATH")),
)  # fmt: skip

_T1 = "DINO [normalization={}; centering={}; epochs=100; seed=mean of 2]"


def _cell(a: tuple[str, str], b: tuple[str, str]) -> dict:
    """Two cells of vMF's Table 1: the test in 54 and the printed pair."""
    return {"tests": (Test("54_", more(KNN, "-".join(a), "-".join(b))),),
            "pairs": (("Table 1", _T1.format(*a), _T1.format(*b), KNN),)}  # fmt: skip


VMF = (
    Claim("vMF", "section 5.1.1, Table 1", "vMF, probability centering beat DINO's ViT-B default (L2, logit)",
          **_cell(("vMF", "probability"), ("L2", "logit"))),
    Claim("vMF", "section 5.1.1, Table 1", "vMF, probability centering beat DINO's ViT-S default (none, logit)",
          **_cell(("vMF", "probability"), ("none", "logit"))),
    Claim("vMF", "section 5.1.1, Table 1", "vMF normalization alone gains (logit centering)",
          **_cell(("vMF", "logit"), ("none", "logit"))),
    Claim("vMF", "section 5.1.1, Table 1", "Probability centering alone gains (no normalization)",
          **_cell(("none", "probability"), ("none", "logit"))),
    Claim("vMF", "section 5.1.1, Table 1", "With vMF, probability centering beats logit centering",
          **_cell(("vMF", "probability"), ("vMF", "logit"))),
    Claim("vMF", "section 5.1.1, Table 1", "Prototypes of free length beat unit prototypes (logit centering)",
          **_cell(("none", "logit"), ("L2", "logit"))),
    Claim("vMF", "section 5.1.2, Table 2", "DINO-vMF beats DINO in kNN",
          (Test("52_", more(KNN, "dino-vmf", "dino")),), pairs=((T2, "DINO-vMF", "DINO", KNN),)),
    Claim("vMF", "section 5.1.2, Table 2", "iBOT-vMF beats iBOT in kNN",
          (Test("52_", more(KNN, "ibot-vmf", "ibot")),), pairs=((T2, "iBOT-vMF", "iBOT", KNN),)),
    Claim("vMF", "section 5.1.3, Table 3", "vMF gains in few-shot classification, largely with ViT-B",
          (Test("80_", mean_more(FEW, "dino-vmf", "dino")), Test("80_", mean_more(FEW, "ibot-vmf", "ibot"))),
          _paper_run("dino-vmf-vitb16", "dino-vitb16", then="prototypes evaluate few-shot RUN --data PATH"),
          tuple((T3, m, b, qualified(FEW, images=n)) for n in ("1/class", "2/class", "5/class", "1%")
                for m, b in (("DINO-vMF", "DINO"), ("iBOT-vMF", "iBOT")))),
    Claim("vMF", "section 5.2, Table 4", "DINO-vMF uses more unique prototypes than DINO of free length (ViT-S)",
          (Test("54_", less(runs(at("utilization.M"), "vMF-probability"), runs(at("utilization.M"), "none-logit")),
                "prototypes"),)),
    Claim("vMF", "section 5.2, Table 4", "DINO-vMF uses more unique prototypes than DINO of unit length (ViT-B)",
          (Test("54_", less(runs(at("utilization.M"), "vMF-probability"), runs(at("utilization.M"), "L2-logit")),
                "prototypes"),)),
    Claim("vMF", "section 5.2, Fig. 7", "Unit prototypes with a logit center form one void set of most prototypes",
          (Test("54_", fixed(HALF, runs(at("utilization.largest_share"), "L2-logit")), "of K"),)),
    Claim("vMF", "section 5.2, Fig. 7", "DINO-vMF forms no void set (at most 0.01 K opposite to the data)",
          (Test("54_", fixed(0.01, runs(at("utilization.void"), "vMF-probability"), -1), "of K"),)),
    Claim("vMF", "section 5.2, Fig. 2", "DINO-vMF: images at prototypes of higher precision are easier for kNN",
          (Test("54_", runs(lift, "vMF-probability")),)),
    Claim("vMF", "section 5.2, Fig. 2", "DINO lacks this: less lift than with vMF",
          (Test("54_", less(runs(lift, "vMF-probability"), runs(lift, "none-logit"))),),
          "prototypes run --only 54 -p scale full -p data PATH"),
    Claim("vMF", "sections 1, 3.2", "DINO-vMF is stable in ViT-B with free prototypes, DINO is not", (),
          _paper_run("dino-vmf-vitb16", "dino-vitb16")),
    Claim("vMF", "section 5.3, Table 5", "iBOT-vMF transfers better than iBOT (mean of the data sets)",
          (Test("82_", mean_more(TRANSFERRED, "ibot-vmf", "ibot")),),
          _paper_run("ibot-vmf-vitb16", "ibot-vitb16", then=_TRANSFER),
          (("Table 5", "iBOT-vMF", "iBOT", TRANSFERRED),)),
    Claim("vMF", "section 5.3, Table 5", "MSN transfers worse than DINO and DINO-vMF", (),
          _paper_run("msn-vitb16", "dino-vitb16", "dino-vmf-vitb16", then=_TRANSFER)),
    Claim("vMF", "section 5.3, Tables 6, 7", "vMF gains in retrieval and video segmentation with ViT-B", (),
          "no protocol here yet: image retrieval, video object segmentation"),
    Claim("vMF", "section A.6.5", "Fine-tuned, vMF is on par or slightly better", (),
          _paper_run("dino-vmf-vitb16", "dino-vitb16", then="prototypes evaluate fine-tune RUN --data PATH")),
)  # fmt: skip


def _collapses(variant: str) -> tuple[Test, ...]:
    return (Test("58_", fixed(COLLAPSED, runs(information, variant), -1), "of ln K"),)


S, D = "SimDINO [epochs=100]", "DINO [epochs=100]"
SIM = (
    Claim("Sim", "section 3.2, Table 1", "SimDINO beats DINO in kNN",
          (*_on_balanced(KNN, "simdino", "dino"), Test("58_", more(KNN, "simdino", "dino"))),
          pairs=(("Table 1", S, D, KNN),)),
    Claim("Sim", "section 3.2, Table 1", "SimDINO beats DINO in linear classification",
          (Test("80_", more(LINEAR, "simdino", "dino")),), pairs=(("Table 1", S, D, LINEAR),)),
    Claim("Sim", "section 3.2, Table 1", "SimDINOv2 beats DINOv2 in kNN",
          (Test("80_", more(KNN, "simdinov2", "dinov2")), Test("52_", more(KNN, "simdinov2", "dinov2"))),
          pairs=(("Table 1", "SimDINOv2 [epochs=100]", "DINOv2 [epochs=100]", KNN),)),
    Claim("Sim", "section 2.2", "The coding rate prevents collapse: more dimensions than untrained",
          (Test("52_", less(runs(at("rank"), "simdino"), runs(at("rank"), "untrained")), "dimensions"),)),
    Claim("Sim", "appendix F.1, Table 5", "DINO collapses at teacher momentum 0.9",
          _collapses("dino-momentum-0.9")),
    Claim("Sim", "appendix F.1, Table 5", "DINO collapses without normalization of the last layer",
          _collapses("dino-free-last-layer")),
    Claim("Sim", "appendix F.1, Table 5", "DINO collapses at a constant teacher temperature of 0.07",
          _collapses("dino-constant-temperature")),
    Claim("Sim", "appendix F.4, Table 8", "DINO collapses without self-distillation",
          _collapses("dino-no-self-distillation")),
    Claim("Sim", "appendix F.4, Table 8", "SimDINO learns without self-distillation: kNN above the untrained network",
          (Test("58_", less(runs(knn, "simdino-no-self-distillation"), runs(knn, "untrained"))),)),
    Claim("Sim", "appendix F.4, Table 8", "Self-distillation still gains in SimDINO",
          (Test("58_", more(KNN, "simdino", "simdino-no-self-distillation")),),
          pairs=(("Table 8", "SimDINO [epochs=100; self-distillation=yes]",
                  "SimDINO [epochs=100; self-distillation=no]", KNN),)),
    Claim("Sim", "appendix F.2, Table 6", "SimDINO bears half the batch (kNN within 1.4 points, as printed)",
          (Test("58_", more(KNN, "simdino", "simdino-batch-32"), margin=1.4),),
          pairs=(("Table 6", "SimDINO [epochs=100; batch=512]", "SimDINO [epochs=100; batch=256]", KNN),)),
    Claim("Sim", "section 3.2, Fig. 2", "SimDINO's kNN rises steadily where DINO's slows down and falls", (),
          _paper_run("simdino-vitb16", "dino-vitb16-100ep", then=f"{_KNN}, of several checkpoints")),
    Claim("Sim", "section 3.2, Table 1", "DINO with ViT-B's settings diverges in ViT-L, SimDINO does not", (),
          _paper_run("dino-vitl16-100ep", "simdino-vitl16")),
    Claim("Sim", "appendix F.3, Table 7", "Twice the epochs gain in SimDINO", (),
          f"prototypes train --paper-run simdino-vitb16 --data PATH --epochs 200; {_KNN}"),
    Claim("Sim", "section 3.2, Fig. 4", "Trained on COCO (a tenth of ImageNet) SimDINO is far above DINO", (),
          "prototypes train --paper-run simdino-vitb16 --data COCO && prototypes train --paper-run dino-vitb16-100ep "
          f"--data COCO; on each: {_KNN}"),
    Claim("Sim", "section 3.2, Table 2", "SimDINO beats DINO in detection and segmentation by MaskCut", (),
          "no protocol here yet: detection and segmentation by MaskCut"),
    Claim("Sim", "section 3.2, Table 3", "SimDINO and SimDINOv2 beat theirs in linear and video segmentation", (),
          "no protocol here yet: linear segmentation, video object segmentation"),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = PPC + VMF + SIM
