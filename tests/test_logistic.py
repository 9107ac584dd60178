import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_features import real

from prototypes_lib.evaluate import logistic
from prototypes_lib.evaluate.features import Features


def objective(x, labels, weight, bias, c):
    logits = x.double() @ torch.as_tensor(weight).double().T + torch.as_tensor(bias).double()
    return (
        c * float(F.cross_entropy(logits, labels, reduction="sum")) + float(torch.as_tensor(weight).square().sum()) / 2
    )


def some(n=300, dim=32):
    train, _ = real()
    return Features(train.x[:n, :dim].contiguous(), train.labels[:n])


@pytest.mark.parametrize("intercept", [True, False])
def test_the_objective_is_that_of_scikit_learn_at_a_tight_tolerance(intercept):
    from sklearn.linear_model import LogisticRegression

    train, cs = some(), [1e-3, 1.0, 100.0]
    for c, found in zip(cs, logistic.path(train, cs, intercept=intercept), strict=True):
        options = {"tol": 1e-10, "max_iter": 200, "solver": "newton-cholesky", "fit_intercept": intercept}
        peer = LogisticRegression(C=c, **options).fit(train.x.double().numpy(), train.labels.numpy())
        best = objective(train.x, train.labels, peer.coef_, peer.intercept_, c)
        mine = objective(train.x, train.labels, found.weight, found.bias, c)
        assert found.converged and found.iterations > 0 and found.c == c
        assert -1e-11 <= mine / best - 1 <= 1e-8
        assert abs(found.objective / mine - 1) < 1e-11
        assert intercept or not found.bias.any()
        assert np.array_equal(found.predict(train.x).numpy(), peer.predict(train.x.double().numpy()))


def test_two_classes_have_a_vector_each_so_that_half_the_c_is_scikit_learns_binary_solution():
    from sklearn.linear_model import LogisticRegression

    train = some(dim=16)
    train = Features(train.x, (train.labels < 4).long())
    peer = LogisticRegression(C=2.0, tol=1e-10, solver="newton-cholesky").fit(train.x.double().numpy(), train.labels)
    found = logistic.fit(train, c=1.0, tol=1e-12)
    assert torch.allclose(found.weight[1] - found.weight[0], torch.from_numpy(peer.coef_[0]), atol=1e-4)
    assert torch.allclose(found.weight.sum(0), torch.zeros(16, dtype=torch.float64), atol=1e-6)


def test_a_path_finds_what_fits_find_in_the_order_asked_for():
    train, cs = some(dim=16), (10.0, 1e-4, 0.3)
    found = logistic.path(train, cs)
    assert [x.c for x in found] == list(cs)
    for one in found:
        alone = logistic.fit(train, c=one.c)
        assert abs(one.objective / alone.objective - 1) < 1e-8


def test_the_told_gap_is_the_gap():
    train = some(dim=16)
    best = logistic.fit(train, c=1.0, tol=1e-13).objective
    for tol in (1e-3, 1e-5, 1e-7):
        rough = logistic.fit(train, c=1.0, tol=tol)
        assert rough.converged and rough.gap <= tol
        assert -1e-12 <= rough.objective / best - 1 <= 3 * tol


def test_the_gradient_told_is_the_gradient_of_the_mean_objective():
    train, c = some(dim=8), 0.5
    found = logistic.fit(train, c=c, tol=1e-4)
    weight, bias = (x.clone().requires_grad_() for x in (found.weight, found.bias))
    loss = F.cross_entropy(train.x.double() @ weight.T + bias, train.labels)
    (loss + weight.square().sum() / (2 * c * len(train.x))).backward()
    largest = float(torch.cat([weight.grad, bias.grad[:, None]], 1).abs().max())
    assert abs(found.gradient / largest - 1) < 1e-6


def test_blocks_and_a_mapped_file_change_nothing(tmp_path, monkeypatch):
    train = some(dim=16)
    whole = logistic.fit(train, c=1.0)
    place = tmp_path / "x.bin"
    train.x.numpy().tofile(place)
    mapped = torch.from_file(str(place), shared=False, size=train.x.numel()).view(train.x.shape)
    monkeypatch.setattr(logistic, "_rows", lambda n, width, device: (slice(i, min(i + 7, n)) for i in range(0, n, 7)))
    parts = logistic.fit(Features(mapped, train.labels), c=1.0)
    assert abs(parts.objective / whole.objective - 1) < 1e-8
    assert torch.equal(parts.predict(mapped), whole.predict(train.x))
    assert torch.allclose(parts.scores(mapped), whole.scores(train.x), atol=1e-3)


def test_classes_are_the_labels_that_there_are():
    train = some(dim=16)
    names = torch.tensor([0, 3, 4, 11, 12, 13, 20, 21, 22, 40])
    plain, named = logistic.fit(train), logistic.fit(Features(train.x, names[train.labels]))
    assert torch.equal(named.classes, names)
    assert torch.equal(named.predict(train.x), names[plain.predict(train.x)])


def test_constant_features_leave_the_frequencies_of_the_classes():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    for constant in (0.0, 3.0):
        found = logistic.fit(Features(torch.full((10, 4), constant), labels), tol=1e-12)
        assert found.converged and float(found.weight.abs().max()) < 1e-6
        shares = found.scores(torch.full((1, 4), constant)).softmax(-1)
        assert torch.allclose(shares, torch.tensor([[0.6, 0.3, 0.1]]), atol=1e-5)
    nothing = logistic.fit(Features(torch.zeros(10, 4), labels), intercept=False)
    assert nothing.converged and not nothing.weight.any()


def test_badly_scaled_features_take_few_steps():
    train = some(dim=16)
    scale = torch.logspace(-4, 4, 16)
    found = logistic.fit(Features(100 + train.x * scale, train.labels), c=1.0)
    assert found.converged and found.iterations < 100


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16])
def test_features_of_any_type_have_the_answers_of_their_numbers(dtype):
    x = (some(dim=16).x * 4).round().clamp(0, 9).to(dtype)
    labels = some().labels
    of_type, of_floats = logistic.fit(Features(x, labels)), logistic.fit(Features(x.float(), labels))
    assert torch.equal(of_type.weight, of_floats.weight)
    assert torch.equal(of_type.scores(x), of_floats.scores(x.float())) and of_type.scores(x).dtype == torch.float32
    assert torch.equal(of_type.predict(x), of_floats.predict(x.float()))
    assert of_floats.scores(x.double()).dtype == torch.float64


def test_large_features_are_fitted_and_larger_ones_refused():
    train = some(dim=8)
    assert logistic.fit(Features(train.x / train.x.abs().max() * 1e15, train.labels)).predict(train.x).shape == (300,)
    with pytest.raises(ValueError, match=r"training images are beyond 1e\+15"):
        logistic.fit(Features(train.x * 1e20, train.labels))


def test_separable_classes_end_and_say_whether_they_converged():
    x = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(i)) + 30 * i for i in range(2)])
    train = Features(x, torch.arange(40) // 20)
    found = logistic.fit(train, c=1e12, max_iterations=30)
    assert found.iterations <= 30 and torch.equal(found.predict(x), train.labels)
    assert found.converged == (found.gap <= 1e-9)
    hurried = logistic.fit(some(), c=1e6, max_iterations=3)
    assert hurried.iterations == 3 and not hurried.converged and hurried.gap > 1e-9


def test_as_few_images_as_classes_are_enough():
    found = logistic.fit(Features(torch.eye(3), torch.arange(3)), c=10.0)
    assert found.converged and found.predict(torch.eye(3)).tolist() == [0, 1, 2]


def test_autocast_and_inference_mode_change_nothing():
    train = some(dim=16)
    plain = logistic.fit(train)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logistic.fit(train).weight, plain.weight)


def test_wrong_requests_name_themselves():
    train = some(20, 4)
    for c in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="c="):
            logistic.fit(train, c=c)
    with pytest.raises(ValueError, match="at least one"):
        logistic.path(train, [])
    with pytest.raises(ValueError, match="tol"):
        logistic.fit(train, tol=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        logistic.fit(train, max_iterations=0)
    with pytest.raises(ValueError, match="all training images have label 2"):
        logistic.fit(Features(train.x, torch.full_like(train.labels, 2)))
    with pytest.raises(ValueError, match="not finite"):
        logistic.fit(Features(train.x / 0, train.labels))
    with pytest.raises(ValueError, match="no label"):
        logistic.fit(Features(train.x, train.labels - 1))
