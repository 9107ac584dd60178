"""Faults in the evaluation protocols, for mutations.py; see faults.py."""

from fault import Fault, planted_in

EVALUATION: list[Fault] = [
    *planted_in(
        "evaluate/knn.py",
        ("kNN ignores its temperature", "score[:, :1]) / temperature)", "score[:, :1]) / 0.07)"),
        ("kNN's votes all weigh the same", 'if weights == "exp":', 'if weights == "no":'),
        ("kNN counts all found neighbors for each k", "[:, : vote.k])\n", "[:, : vote.k] * 0 + 1)\n"),
    ),
    *planted_in(
        "evaluate/intervals.py",
        ("Wilson's interval at 90 %", "z: float = 1.96", "z: float = 1.645"),
        ("a bootstrap without replacement", "torch.randint(len(values), (len(values),), generator=draw)",
         "torch.randperm(len(values), generator=draw)"),
        ("an interval over seeds with one more degree of freedom", "len(x) - 1) * float(x.std())",
         "len(x)) * float(x.std())"),
    ),
    *planted_in(
        "evaluate/logistic.py",
        ("the intercept is penalized", "penalty[self.dim :] = 0", "penalty[self.dim :] *= 1"),
        ("regularization of the mean loss, not of the sum", "(self.width,), 1 / (c * self.n))",
         "(self.width,), 1 / c)"),
    ),
    *planted_in(
        "evaluate/few_shot.py",
        ("few-shot: lambda taken as C", "c=1 / lambd", "c=lambd"),
        ("few-shot: features centered over images", "wide - wide.mean(1, keepdim=True)",
         "wide - wide.mean(0, keepdim=True)"),
        ("few-shot: every split is the first", "np.random.default_rng((seed, split, round(1e6 * images)))",
         "np.random.default_rng((seed, 0, round(1e6 * images)))"),
    ),
    *planted_in(
        "evaluate/linear.py",
        ("linear probe without momentum", "x, beta=0.9)", "x, beta=0.0)"),
        ("linear probes share one learning rate", "self.rate[:, None], self.vel", "self.rate[:1, None], self.vel"),
        ("the twins see the held-out images", "error *= shares.T[:, None]", "error /= len(x)"),
    ),
    *planted_in(
        "evaluate/transfer.py",
        ("transfer: not fitted again with the validation images", "logistic.fit(everything,", "logistic.fit(train,"),
        ("transfer: the worst lambda is taken", "best = max(range(len(cs))", "best = min(range(len(cs))"),
        ("transfer: mean over images, not over classes", "labels.bincount(hits)[here] / counts[here]).mean()",
         "labels.bincount(hits)[here]).sum() / len(labels)"),
    ),
    *planted_in(
        "evaluate/long_tail.py",
        ("exactly 100 images are the head", "counts[classes] > groups[0]", "counts[classes] >= groups[0]"),
        ("exactly 20 images are the tail", "counts[classes] < groups[1]", "counts[classes] <= groups[1]"),
        ("bootstrap of classes biased for few images", "(here - 1).clamp_min(1) * (here > 0)", "here"),
    ),
    *planted_in(
        "data/long_tail.py",
        ("a long tail one class too long", "factor ** (-c / last)", "factor ** (-c / (last + 1))"),
        ("a long tail always drawn alike", "default_rng((seed, label))", "default_rng((0, label))"),
    ),
    *planted_in(
        "evaluate/clusters.py",
        ("NMI over the larger entropy", "(entropy(a) + entropy(b)) / 2", "torch.maximum(entropy(a), entropy(b))"),
        ("ARI not adjusted for chance", "(together - expected) / (most - expected)", "together / most"),
        ("clusters matched as badly as can be", "maximize=True", "maximize=False"),
        ("a prototype is named by its rarest class", "descending=True).flip(0)", "descending=True)"),
    ),
    *planted_in(
        "evaluate/precision.py",
        ("redundancy: the share of all, not of one prototype", "100 * h / n / m for", "100 * h / n for"),
        ("precision: rounding orders unit prototypes", "<= 1e-5 * kappa", "<= 0 * kappa"),
        tests=("evaluate_precision",),
    ),
    *planted_in(
        "evaluate/fine_tune.py",
        ("fine-tuning: deep layers learn slowest", "layer_decay ** (top - layer)", "layer_decay**layer"),
        ("fine-tuning: biases decay", "parameter.ndim == 1 or name in tokens", "name in tokens"),
        ("fine-tuning: parts are added, not averaged", "targets) / parts\n", "targets)\n"),
    ),
    *planted_in(
        "evaluate/robustness.py",
        ("corruption errors are not normalized",
         "torch.tensor([base[name] for name in names]", "torch.tensor([100.0 for _ in names]"),
        ("relative errors forget the clean one", "(wrong - clean[:, None]) / torch.where", "wrong / torch.where"),
    ),
    *planted_in(
        "evaluate/feature_files.py",
        ("damaged features are taken", "file.read() == digest.digest()", "True"),
        tests=("features",),
    ),
    *planted_in(
        "official/backbones.py",
        ("a class token without its position", ' + tensors["pos_embed"][:, :1]', ""),
        tests=("official",),
    ),
]  # fmt: skip
