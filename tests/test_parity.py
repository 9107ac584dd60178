"""Where lightly computes the same thing: value and gradient in float64, and the deviations that we keep on purpose.

The comparisons are those of benchmarks/parity.py. Without lightly this file is not collected (conftest.py).
"""

import json

import parity
import pytest

pytestmark = pytest.mark.parity
CONFIGS = 50
BY_NAME = {comparison.lightly: comparison for comparison in parity.COMPARISONS}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_value_and_gradient_are_lightlys(name):
    value, gradient = parity.compare(BY_NAME[name], CONFIGS, seed=1)
    assert value < 1e-10 and gradient < 1e-10


def deviations(name):
    return BY_NAME[name].deviations()


def test_dinos_center_has_float64_digits():
    (center,) = deviations("DINOLoss")
    assert center.ours < 1e-4 < 1e-3 < center.lightly


def test_sinkhorn_does_not_overflow():
    (overflow,) = deviations("SwaVLoss")
    assert overflow.ours == pytest.approx(1) and overflow.lightly != overflow.lightly


def test_msn_leaves_out_ln_k_and_takes_log_softmax():
    constant, power = deviations("MSNLoss")
    assert constant.lightly - constant.ours == pytest.approx(1.0986123, abs=1e-6)
    assert power.ours == pytest.approx(1000) and power.lightly == float("inf")


def test_pmsn_is_kl_from_the_marginal_to_the_prior_not_back():
    (direction,) = deviations("PMSNLoss without regularizer")
    prior = [j**-0.25 for j in (1, 2, 3)]
    prior, p = [x / sum(prior) for x in prior], [0.6, 0.3, 0.1]
    kl = lambda a, b: sum(x * parity.math.log(x / y) for x, y in zip(a, b, strict=True))
    assert direction.ours == pytest.approx(kl(p, prior), abs=1e-6)
    assert direction.lightly == pytest.approx(kl(prior, p), abs=1e-6)
    assert abs(direction.ours - direction.lightly) > 0.01


def test_ibots_center_sees_all_patches_and_dinov2s_the_masked_ones():
    (center,) = deviations("IBOTPatchLoss")
    assert center.ours == pytest.approx(0.1 * 2) and center.lightly == pytest.approx(0.1 * 4)


def test_koleo_counts_eps_once_and_gives_copies_no_gradient_and_one_vector_no_loss():
    eps, copies, one = deviations("KoLeoLoss")
    assert eps.ours == pytest.approx(-parity.math.log(2e-8), abs=1e-6) and eps.lightly < eps.ours - 0.1
    assert copies.ours == 0 and copies.lightly > 1e6
    assert one.ours == 0 and one.lightly > 10


def test_the_coding_rate_is_subtracted():
    (sign,) = deviations("EMPSSLLoss's tcr_loss")
    assert sign.ours == pytest.approx(-sign.lightly) and sign.ours < 0


def test_the_alignment_is_zero_at_best():
    (constant,) = deviations("NegativeCosineSimilarity")
    assert constant.ours == pytest.approx(0, abs=1e-7) and constant.lightly == pytest.approx(-1)


def test_the_command_writes_a_record(tmp_path, capsys):
    parity.main(["--configs", "2", "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "parity_lightly.json").read_text())["runs"]
    assert [row["lightly"] for row in run["table"]] == list(BY_NAME) and run["environment"]["lightly"]
    assert "DINOLoss" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--configs 0: at least one"):
        parity.main(["--configs", "0"])
