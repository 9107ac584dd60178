import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_features import backbone, images, real
from sklearn import metrics

from prototypes_lib import checkpoints, scores
from prototypes_lib.evaluate import Features, extract
from prototypes_lib.evaluate.clusters import (
    clusters,
    prototype_assignments,
    prototypes_as_classes,
    score_of,
)
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Network
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.optimizers import make_optimizer
from prototypes_lib.train import Run, build, config, train

SETTINGS = Run.small(
    limit=64, batch_size=32, epochs=2.0, warmup_epochs=0.0, hidden=16, bottleneck=8, progress=False, head_layers=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps with 24 prototypes."""
    method = METHODS["dino-vmf"].but(views=Views(2, 0), n_prototypes=24)
    return train(method, SETTINGS.but(out=str(tmp_path_factory.mktemp("runs"))), "dino-vmf").folder


def untrained(folder, name: str, change=lambda teacher: None, **changes):
    """The checkpoint of a run before its first step, its teacher changed."""
    method = METHODS[name].but(views=Views(2, 0), **changes)
    method = method.but(n_prototypes=24) if method.n_prototypes else method
    learner = build(method, SETTINGS)
    change(learner.teacher)
    what = config(method, SETTINGS, name, images()[0])
    checkpoints.save(folder, learner, make_optimizer(learner.student, SETTINGS), {"step": 0, "hash": what["hash"]})
    (folder / "config.json").write_text(json.dumps(what))
    return folder


def assigned(features: Features, k: int = 30) -> torch.Tensor:
    """Real images to the nearest of k of them."""
    return (features.x @ features.x[:k].T - features.x[:k].square().sum(1) / 2).argmax(1)


def test_agreement_with_classes_is_scikit_learns():
    train, _ = real()
    for k in (2, 10, 30, 300):
        codes = assigned(train, k)
        found, truth = clusters(codes, train.labels, draws=2), train.labels.numpy()
        assert found.nmi == pytest.approx(metrics.normalized_mutual_info_score(truth, codes), abs=1e-12)
        assert found.ari == pytest.approx(metrics.adjusted_rand_score(truth, codes), abs=1e-12)
        assert found.fmi == pytest.approx(metrics.fowlkes_mallows_score(truth, codes), abs=1e-12)
        table = metrics.cluster.contingency_matrix(truth, codes)
        assert found.purity == pytest.approx(100 * table.max(0).sum() / len(truth))
        assert (found.used, found.classes, found.n) == (table.shape[1], 10, 1000)


partitions = st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2))


@settings(max_examples=25)
@given(partitions)
def test_any_two_partitions_are_compared_as_scikit_learn_does(pair):
    codes, labels = map(torch.tensor, pair)
    found = clusters(codes, labels, draws=2)
    assert found.nmi == pytest.approx(metrics.normalized_mutual_info_score(*pair), abs=1e-9)
    assert found.ari == pytest.approx(metrics.adjusted_rand_score(*pair), abs=1e-9)
    assert found.fmi == pytest.approx(metrics.fowlkes_mallows_score(*pair), abs=1e-9)
    swapped = clusters(labels, codes, draws=2)
    assert (swapped.nmi, swapped.ari) == pytest.approx((found.nmi, found.ari), abs=1e-9)
    assert found.purity >= found.accuracy - 1e-9


def test_matched_accuracy_is_the_best_of_all_matchings():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    for k in (3, 4, 6):
        codes = torch.where(torch.rand(200, generator=generator) < 0.5, labels % k, torch.randint(k, (200,)))
        found = clusters(codes, labels, draws=2)
        table = metrics.cluster.contingency_matrix(codes, labels)
        table = np.pad(table, ((0, 6 - len(table)), (0, 2)))  # clusters without a class, classes without a cluster
        best = max(sum(table[i, j] for i, j in enumerate(way)) for way in itertools.permutations(range(6)))
        assert found.accuracy == pytest.approx(100 * best / 200)


def test_more_clusters_than_classes_limit_accuracy_but_not_purity():
    labels = torch.arange(100) % 2
    found = clusters(torch.arange(100) % 10, labels, k=64)  # five pure clusters a class, of ten images each
    assert (found.accuracy, found.purity, found.k, found.used) == (20, 100, 64, 10)
    assert found.ari < found.nmi < 1
    alone = clusters(torch.arange(100), labels)
    assert (alone.purity, alone.ari, alone.accuracy) == (100, 0, 2)


@pytest.mark.slow
def test_intervals_are_as_wide_as_new_samples_differ():
    generator = torch.Generator().manual_seed(0)

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(5, (400,), generator=generator)
        kept = torch.rand(400, generator=generator) < 0.6
        return torch.where(kept, labels + 5 * torch.randint(4, (400,), generator=generator), 20), labels

    values = [clusters(*sample(), draws=2) for _ in range(120)]
    found = clusters(*sample())
    for name, most in (("nmi", 1.3), ("ari", 1.3), ("fmi", 2.0)):  # pairs of one image twice make it wide
        low, high = getattr(found, f"{name}_interval")
        assert low < getattr(found, name) < high
        half = 1.96 * np.std([getattr(value, name) for value in values])
        assert 0.8 * half <= (high - low) / 2 <= most * half, name


def test_the_same_seed_gives_the_same_intervals():
    train, _ = real()
    a, b, c = (clusters(assigned(train), train.labels, draws=20, seed=seed) for seed in (0, 0, 1))
    assert a == b and a.nmi_interval != c.nmi_interval and a.nmi == c.nmi


def test_wrong_input_is_one_line():
    labels = torch.arange(10) % 2
    for call, words in (
        (lambda: clusters(labels[:5], labels), "5 assignments of 10 images"),
        (lambda: clusters(labels[:0], labels[:0]), "at least one"),
        (lambda: clusters(labels, labels - 1), "5 images have no label"),
        (lambda: clusters(labels - 1, labels), "between 0 and k - 1"),
        (lambda: clusters(labels, labels, k=1), "k=1"),
        (lambda: clusters(labels, labels, draws=1), "at least 2"),
        (lambda: prototypes_as_classes(labels, labels[:3], labels, labels), "10 assignments of 3 training"),
        (lambda: prototypes_as_classes(labels, labels, labels[:0], labels[:0]), "0 test images"),
        (lambda: prototypes_as_classes(labels, labels - 1, labels, labels), "no label"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_one_cluster_and_one_class():
    ones = torch.zeros(50, dtype=torch.long)
    both, classes = clusters(ones, ones), clusters(ones, torch.arange(50) % 5)
    assert (both.nmi, both.ari, both.accuracy) == (1, 1, 100) and both.nmi_interval == (1, 1)
    assert (classes.nmi, classes.ari, classes.accuracy) == (0, 0, 20)


# ----------------------------------------------------------------------------- prototypes of networks


@pytest.mark.parametrize("name", ["dino", "dino-vmf"])
def test_assignments_are_those_of_scores_written_out(run, tmp_path, name):
    folder = run if name == "dino-vmf" else untrained(tmp_path, name)
    network, (pictures, _) = checkpoints.load_network(folder), images()
    pictures = pictures.subset(slice(100))
    features = extract(network.backbone, pictures)
    found = prototype_assignments(network, features, score_of(folder), block=24 * 7)
    w = checkpoints.load_prototypes(folder).double()
    for i in range(0, 100, 9):
        y = network.projector(features.x[i : i + 1])[0].double().detach()
        if name == "dino":
            logits = [float(w[k] @ y / w[k].norm()) for k in range(24)]
        else:  # at the teacher's last temperature
            logits = [float(scores.vmf(y[None], w[k : k + 1], 0.07)) for k in range(24)]
        assert int(found[i]) == int(np.argmax(logits))
    few = torch.tensor([20, 3, 11])
    among = prototype_assignments(network, features, score_of(folder), only=few)
    whole = score_of(folder)(network.projector(features.x), network.prototypes.w)
    assert torch.equal(among, whole[:, few].argmax(1)) and among.max() <= 2


def test_the_score_of_a_run_is_its_methods_with_the_last_temperature(run, tmp_path):
    assert score_of(run).func is scores.vmf and score_of(run).keywords == {"tau": 0.07}
    assert score_of(run, "student").keywords == {"tau": 0.1}
    for told, func, keywords in (
        ("scores.dot", scores.dot, {"tau": 0.04}),
        ({"name": "scores.vmf", "args": [], "terms": 1}, scores.vmf, {"tau": 0.04, "terms": 1}),
    ):
        method = {"score": told, "teacher_temp": 0.04, "student_temp": 0.1}
        (tmp_path / "config.json").write_text(json.dumps({"method": method}))
        assert (score_of(tmp_path).func, score_of(tmp_path).keywords) == (func, keywords)
    (tmp_path / "config.json").write_text('{"method": {"score": "mine", "teacher_temp": 1, "student_temp": 1}}')
    with pytest.raises(ValueError, match="score 'mine' is none of"):
        score_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        score_of(tmp_path / "nowhere")


def test_a_loaded_network_is_the_runs(run):
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind in ("teacher", "student"):
        network = checkpoints.load_network(run, kind)
        assert not any(module.training for module in network.modules())
        assert torch.equal(network.backbone(x)[0], checkpoints.load_backbone(run, kind)(x)[0])
        assert torch.allclose(network.prototypes.w, checkpoints.load_prototypes(run, kind))
    with pytest.raises(FileNotFoundError):
        checkpoints.load_network(run.parent)
    with pytest.raises(ValueError, match="choose 'teacher' or 'student'"):
        checkpoints.load_network(run, "both")


@pytest.mark.parametrize("name", ["simdino", "swav", "dinov2"])
def test_networks_without_prototypes_without_teacher_and_with_two_heads_are_loaded(tmp_path, name):
    folder = untrained(tmp_path, name, **({"queue": None} if name == "swav" else {}))
    network = checkpoints.load_network(folder)
    assert (network.prototypes is None, network.patch_prototypes is None) == (name == "simdino", name != "dinov2")
    if name == "simdino":
        with pytest.raises(ValueError, match="no prototypes"):
            prototype_assignments(network, real()[0], scores.cosine)


def test_a_network_is_left_as_it_was_and_other_features_are_refused(run):
    network = checkpoints.load_network(run).train()
    prototype_assignments(network, real()[1], score_of(run))
    assert network.training and network.projector.training
    with pytest.raises(ValueError, match="3 dimensions, the network's backbone 64"):
        prototype_assignments(network, Features(torch.ones(2, 3), torch.zeros(2).long()), score_of(run))


def test_prototypes_as_classes_name_by_training_images_and_try_on_test_images():
    train_codes, train_labels = torch.tensor([0, 0, 0, 1, 1, 3, 3]), torch.tensor([2, 2, 1, 1, 0, 4, 4])
    test_codes, test_labels = torch.tensor([0, 0, 1, 2, 3, 5]), torch.tensor([2, 1, 0, 2, 4, 0])
    found = prototypes_as_classes(train_codes, train_labels, test_codes, test_labels)
    assert (found.named, found.classes, found.nameless, found.n) == (3, 3, 2, 6)
    assert found.accuracy == pytest.approx(50)  # 0 is named 2, 1 is named 0 (a tie), 3 is named 4


def test_prototypes_as_classes_equal_a_loop_over_real_images():
    train, test = real()
    w = train.x[:50]
    codes = [(part.x @ w.T - w.square().sum(1) / 2).argmax(1) for part in (train, test)]
    found, right = prototypes_as_classes(codes[0], train.labels, codes[1], test.labels), 0
    for code, label in zip(codes[1].tolist(), test.labels.tolist(), strict=True):
        right += np.bincount(train.labels[codes[0] == code]).argmax() == label
    assert found.accuracy == pytest.approx(100 * right / 500) and found.nameless == 0
    assert found.accuracy > 15, "features of real images are better than chance"
    own = prototypes_as_classes(codes[0], train.labels, codes[0], train.labels)
    assert own.accuracy == pytest.approx(clusters(codes[0], train.labels, draws=2).purity)


def test_batch_norm_in_the_projector_is_not_touched():
    torch.manual_seed(0)
    projector, prototypes = Projector(64, 16, 8, batch_norm=True), Prototypes(5, 8, free_norms=True)
    network = Network(backbone(), projector, prototypes)
    before = {k: v.clone() for k, v in projector.state_dict().items()}
    one = prototype_assignments(network, real()[1], lambda y, w: scores.cosine(y, w, 0.1), block=5)
    assert torch.equal(one, prototype_assignments(network, real()[1], lambda y, w: scores.cosine(y, w, 0.1)))
    assert all(torch.equal(v, before[k]) for k, v in projector.state_dict().items())
