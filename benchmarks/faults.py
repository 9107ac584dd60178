"""The faults that mutations.py plants: mistakes one makes while writing such code, one line or a few each.

A fault replaces `old`, which stands exactly once in its file, by `new`. `tests` are run first; where they say nothing,
the tests of the whole family (mutations.SECOND) have their turn.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """name: what is wrong. file: inside prototypes_lib. tests: those to run first, by the file's name if none."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[str, ...]:
        stem = self.file.rsplit("/", 1)[-1].removesuffix(".py")
        return tuple(f"tests/test_{name}.py" for name in self.tests or (stem,))


def _in(file: str, *faults: tuple[str, str, str], tests: tuple[str, ...] = ()) -> list[Fault]:
    return [Fault(name, file, old, new, tests) for name, old, new in faults]


FAULTS: list[Fault] = [
    *_in(
        "objectives.py",
        (
            "cross-entropy from the student to the teacher",
            "-(targets * torch.where(targets > 0, log_p, 0.0)).sum(-1)",
            "-(log_p.exp() * torch.log(targets.clamp_min(1e-30))).sum(-1)",
        ),
        (
            "a view is compared with itself too",
            "        n = len(teacher) - (v < len(teacher))\n        if n:\n"
            "            others = (total - teacher[v]) if v < len(teacher) else total\n",
            "        n = len(teacher)\n        if n:\n            others = total\n",
        ),
        ("the mean over student views, not over pairs", "return loss / pairs", "return loss / len(student)"),
        (
            "the weight of a sample is dropped",
            "sum(-1)  # 0 log 0 is 0\n    return loss.mean() if weight is None else (weight * loss).sum()",
            "sum(-1)  # 0 log 0 is 0\n    return loss.mean()",
        ),
        ("codes are pushed apart", "loss = 1 - (wide(a)", "loss = 1 + (wide(a)"),
    ),
    *_in(
        "blockwise.py",
        ("predictions have no gradient towards their targets", "torch.neg(barycentres, out=d_toward[span])", "pass"),
        ("prototypes have no gradient from the targets", "sums.add(q, -y, -v)", "pass"),
        ("offsets have no gradient from the targets", "sums.add(q, -y, -v)", "sums.add(q, -y, 0 * v)"),
        ("a block forgets the ones before it", "codes, beta=self._beta)", "codes, beta=0.0)"),
        ("a tile takes its sum for the row's", "(log_sums - log_sum).exp()", "torch.ones_like(log_sums)"),
        ("a target agrees with its own view too", "toward = toward - own", "pass"),
        (
            "a block sees its own rows only",
            "columns = here if columns is None else torch.logaddexp(columns, here)",
            "columns = here",
        ),
        ("log-sums of one rank", "return self, ranks.log_total(columns)", "return self, columns"),
        ("means of one rank", "mean = ranks.total(self.codes.sum(0)) / n", "mean = self.codes.sum(0) / n"),
        ("sums below what float32 holds are taken", "sums.amin() > 1e-30:", "True:"),
        tests=("blockwise", "assignment", "world_size"),
    ),
    *_in(
        "ranks.py",
        ("the gradient of a sum stays on its rank", "return _Total.apply(grad)\n", "return grad\n"),
        ("the gradient of gathered rows stays on its rank", "return _Total.apply(grad)[start :", "return grad[start :"),
        tests=("ranks", "world_size"),
    ),
    *_in(
        "assignment.py",
        (
            "Sinkhorn normalizes over the wrong axis",
            "scores = scores.plus(torch.where(void, 0.0, -mass))",
            "scores = scores.normalized()",
        ),
        ("Sinkhorn takes one step too few", "for step in range(self.steps):", "for step in range(self.steps - 1):"),
        ("the center is not saved", "dtype=torch.float64))  # K", "dtype=torch.float64), persistent=False)  # K"),
        (
            "the center is updated before it is used",
            "return centered\n",
            "return scores - self.center.to(scores.dtype) / scale\n",
        ),
        (
            "the center's momentum is reversed",
            "(self.center.dtype), 1 - self.momentum)",
            "(self.center.dtype), self.momentum)",
        ),
        ("the center moves in eval mode", "if self.training:  # a batch", "if True:  # a batch"),
        ("the logit center forgets the temperature", "scores.means() * tau, scale=tau", "scores.means(), scale=1.0"),
        (
            "the probability center is divided by tau",
            "clamp_min(1).log(), scale=1.0)",
            "clamp_min(1).log(), scale=tau)",
        ),
        (
            "the mean of logs in place of the log of the mean",
            "log_sums - scores.size().clamp_min(1).log()",
            "scores.normalized().means()",
        ),
        ("Eq. 9 as printed is ignored", "scores.plus(-log_normalizer) if self.literal else scores", "scores"),
        ("two methods share one center", "return copy.deepcopy(target)", "return target"),
        (
            "Normalize does nothing",
            "return scores.normalized()\n\n\nclass Sinkhorn",
            "return scores\n\n\nclass Sinkhorn",
        ),
    ),
    *_in(
        "regularizers.py",
        ("the sign of KoLeo", "return -torch.cat(logs)", "return torch.cat(logs)"),
        ("KoLeo of vectors that are not normalized", "    x = directions(x)\n", "    x = wide(x)\n"),
        ("a vector is its own neighbor beyond the first tile", "if i == j:", "if i == j == 0:"),
        ("a tile serves its rows alone", "if i != j:", "if False:"),
        ("padding is a neighbor", "tile[:, n - j :] = -torch.inf", "pass"),
        ("KoLeo among the rows of one rank", "x = ranks.rows(x) if gathered else x", "x = x"),
        (
            "the coding rate of one rank's rows",
            "_rate(ranks.rows(wide(z)), eps, groups)",
            "_rate(wide(z), eps, groups)",
        ),
        ("the marginal of one rank's rows", "sums = ranks.total(torch.cat", "sums = (torch.cat"),
        ("eps is not squared", "dim / (n * eps**2)", "dim / (n * eps)"),
        (
            "gamma is halved",
            "return (1 / z.shape[1] + 1 / len(z)) * rate",
            "return (1 / z.shape[1] + 1 / len(z)) * rate / 2",
        ),
        ("groups are ignored", "reshape(groups, n // groups, dim)", "reshape(1, n, dim)"),
        ("logdet in place of its half", "half_logdet = torch.log(factor", "half_logdet = 2 * torch.log(factor"),
        (
            "the mean of entropies in place of the entropy of the mean",
            "    marginal = _marginal(p)\n    return -(marginal * _log(marginal)).sum()",
            "    return -(wide(p) * _log(wide(p))).sum(-1).mean()",
        ),
        (
            "KL in the other direction",
            "return (marginal * (_log(marginal) - torch.log(prior.to(marginal)))).sum()",
            "return (prior.to(marginal) * (torch.log(prior.to(marginal)) - _log(marginal))).sum()",
        ),
        ("the power law rises", "** -float(exponent)", "** float(exponent)"),
    ),
    *_in(
        "methods.py",
        (
            "a coefficient runs backwards",
            "self.end + 0.5 * (self.start - self.end)",
            "self.start + 0.5 * (self.end - self.start)",
        ),
        (
            "lengths of dot's prototypes are not free",
            "return self.score is not scores.cosine and",
            "return self.score is scores.vmf and",
        ),
        (
            "MSN's target is an anchor too",
            "return 1 if self.views.n_targets == 1 and self.patch is None else 0",
            "return 0",
        ),
        (
            "MSN makes the mean entropy small",
            '((-1.0, mean_entropy, "probabilities"),)',
            '((1.0, mean_entropy, "probabilities"),)',
        ),
        (
            "KoLeo-proto falls on the features",
            '_method.plus(0.1, koleo, on="prototypes")',
            '_method.plus(0.1, koleo, on="features")',
        ),
    ),
    *_in(
        "learner.py",
        (
            "targets at the student's temperature",
            "affine(method.score, self.teacher.prototypes.w.detach(), temperature)",
            "affine(method.score, self.teacher.prototypes.w.detach(), method.student_temp)",
        ),
        (
            "predictions at the teacher's temperature",
            "student = affine(method.score, w, method.student_temp)",
            "student = affine(method.score, w, method.teacher_temp.end)",
        ),
        (
            "the student's own codes are not detached",
            "codes[: n_targets * len(views[0])].detach()",
            "codes[: n_targets * len(views[0])]",
        ),
        (
            "the teacher's codes have a gradient",
            "    @torch.no_grad()\n    def _teacher_codes",
            "    def _teacher_codes",
        ),
        (
            "the teacher never moves",
            "_foreach_lerp_(teacher, student, 1 - momentum)",
            "_foreach_lerp_(teacher, student, 0.0)",
        ),
        (
            "the teacher's momentum is reversed",
            "_foreach_lerp_(teacher, student, 1 - momentum)",
            "_foreach_lerp_(teacher, student, momentum)",
        ),
        ("the teacher drops residual branches", "            _without_drop_path(self.teacher)", "            pass"),
        ("the teacher has prototypes of its own", "self.teacher.prototypes = self.student.prototypes", "pass"),
        ("plain prototypes are not set to unit length", "prototypes.renormalize()", "pass"),
        (
            "the patch loss is over all patches",
            "        masked = masks.flatten(1) if method.patch else None\n",
            "        masked = torch.ones_like(masks).flatten(1) if method.patch else None\n",
        ),
        (
            "masked patches weigh alike, not images",
            "(1 / (per_image * len(masked)))",
            "(1 / masked.sum() + 0 * per_image)",
        ),
        (
            "images without a mask are left out of the mean",
            "(per_image * len(masked))",
            "(per_image * masked.any(1).sum())",
        ),
        (
            "patch targets always from all patches",
            'if masked is not None and self.method.patch.targets_from == "all":',
            "if masked is not None:",
        ),
        ("patch targets of other places", ".only(of_masked)", ".only(slice(len(codes)))"),
        ("the student sees the masked patches", 'return {"mask": masks}', "return {}"),
        (
            "the patch drop keeps what it should drop",
            "torch.nonzero(~masks.flatten())",
            "torch.nonzero(masks.flatten())",
        ),
        (
            "patches' own projector is ignored",
            "(network.patch_projector or network.projector)(hidden)",
            "network.projector(hidden)",
        ),
        (
            "patches' own prototypes are ignored",
            "w_patch = self.student.patch_prototypes.w",
            "w_patch = w",
        ),
        (
            "patches share the crops' center",
            "_targets(self.patch_chain, t_codes",
            "_targets(self.chain, t_codes",
        ),
        ("the queue is never used", "if int(self.filled[i]) >= length:", "if False:"),
        ("the queue is used before it is full", "int(self.filled[i]) >= length", "int(self.filled[i]) > 0"),
        (
            "the queue is not saved",
            "prototypes.weight_v.shape[1]))",
            "prototypes.weight_v.shape[1]), persistent=False)",
        ),
        (
            "the queue keeps its oldest codes",
            "self.codes[i] = torch.cat([new, past])[:length]",
            "self.codes[i] = torch.cat([past, new])[:length]",
        ),
        ("the queue starts at once", "if epoch < self.epoch:", "if False:"),
        (
            "SwAV's views are balanced together",
            "groups = t_codes[None] if method.joint_targets else t_codes[:, None]",
            "groups = t_codes[None]",
        ),
        (
            "views are centered one after the other",
            "groups = t_codes[None] if method.joint_targets else t_codes[:, None]",
            "groups = t_codes[:, None]",
        ),
        (
            "MSN's large anchor counts as its own target",
            "student.offsets, targets, method.first_view",
            "student.offsets, targets, 0",
        ),
        (
            "KoLeo is averaged over crops",
            '/ (1 if place == "features" else max(len(values), 1))',
            "/ max(len(values), 1)",
        ),
        ("averaged codes without the teacher's", "(0.5 * (codes[:n] + t_codes))", "codes[:n]"),
        ("the weight of the image term is ignored", "at(method.image_weight, progress) * image", "image"),
    ),
    *_in(
        "heads.py",
        (
            "codes are not normalized",
            "return F.normalize(wide(self.mlp(x)), dim=-1, eps=1e-6)",
            "return wide(self.mlp(x))",
        ),
        ("the length of unit prototypes is trained", "requires_grad=free_norms and not plain", "requires_grad=True"),
        ("all prototypes are set to unit length", "        if self.plain:\n", "        if True:\n"),
    ),
    *_in(
        "stochastic_depth.py",
        (
            "kept branches are not weighted",
            "weight = keep / (1 - dropping[:, None]).clamp_min(1e-9)",
            "weight = keep * 1.0",
        ),
        (
            "all ranks draw the masks of the first rows",
            "whole[..., _place.start : _place.start + _place.size]",
            "whole[..., : _place.size]",
        ),
        ("rows are dropped in eval mode", "p.drop_prob if p.training else 0.0", "p.drop_prob"),
        ("a ResNet's masks stay for its next call", "path.kept = None\n\n\ndef _paths", "pass\n\n\ndef _paths"),
    ),
    *_in(
        "batch_norm.py",
        ("the running variance is the biased one", "unbiased = var * (n / (n - 1).clamp_min(1))", "unbiased = var"),
        ("a single row is remembered", "many = n > 1", "many = n > 0"),
        ("a second computation is remembered", "setattr(module, name, buffer.clone())", "pass"),
    ),
    *_in(
        "precision.py",
        (
            "a direction's gradient keeps its part along the vector",
            "torch.addcmul(grad, y, along + grad_r * r, value=-1)",
            "grad.clone()",
        ),
        ("directions overflow", "torch.where(largest == 0, 1.0, largest)", "torch.ones_like(largest)"),
        tests=("heads",),
    ),
    *_in(
        "vmf.py",
        ("the sign of the derivative of log C_p", "return -grad * kappa * slope", "return grad * kappa * slope"),
        (
            "the second derivative at the wrong order",
            "_Slope.apply(kappa, ctx.dim + 2) - h",
            "_Slope.apply(kappa, ctx.dim + 1) - h",
        ),
        ("nu = p / 2", "f, q = _bessel(kappa, dim / 2 - 1)", "f, q = _bessel(kappa, dim / 2)"),
        ("the sampler's envelope has another constant", "m * math.log(4 * b", "m * math.log(2 * b"),
        ("EM divides by all samples", "fit_concentration(length / mass, dim)", "fit_concentration(length / n, dim)"),
    ),
    *_in(
        "scores.py",
        ("log C_p is missing", "return logits + _vmf.log_normalizer(kappa, w.shape[-1], terms=terms)", "return logits"),
        ("kappa forgets the temperature", "w.to(logits.dtype), dim=-1) / tau", "w.to(logits.dtype), dim=-1)"),
        ("cosine keeps the lengths", "return dot(y, directions(w), tau)", "return dot(y, w, tau)"),
    ),
    *_in(
        "collapse.py",
        (
            "near-copies at a distance of exactly eps",
            "1 - similarity.amax(dim=-1) < eps",
            "1 - similarity.amax(dim=-1) <= eps",
        ),
        (
            "a prototype joins the nearest representative",
            "(1 - similarity[hit] < eps).int().argmax(dim=-1)",
            "similarity[hit].argmax(dim=-1)",
        ),
        ("the void set points at the data", "mask = 1 + cosine < eps", "mask = 1 - cosine < eps"),
        (
            "the softmax of the mean in place of the mean softmax",
            "p = torch.softmax(log_scores, -1).mean(0)",
            "p = torch.softmax(log_scores.mean(0), -1)",
        ),
    ),
    *_in(
        "schedules.py",
        (
            "the warm-up is off by one",
            "np.linspace(warmup_from, start, warmup_steps)",
            "np.linspace(warmup_from, start, warmup_steps + 1)[:-1]",
        ),
        ("the cosine is longer by the warm-up", "round(stretch * steps) - warmup_steps", "round(stretch * steps)"),
    ),
    *_in(
        "settings.py",
        (
            "the root of the batch is not taken",
            "math.sqrt(self.batch_size / self.lr_batch_size)",
            "(self.batch_size / self.lr_batch_size)",
        ),
        tests=("schedules",),
    ),
    *_in(
        "optimizers.py",
        ("layer decay is off by one", "(student.backbone.n_layers + 1 - ", "(student.backbone.n_layers - "),
        (
            "the prototypes' factor of weight decay is ignored",
            "float(matrix) * (run.prototype_weight_decay if prototypes else 1.0)",
            "float(matrix)",
        ),
        ("norms decay", 'not (name.endswith(".bias") or parameter.ndim == 1)', 'not name.endswith(".bias")'),
        ("modules are clipped as one", 'if run.clip == "module" else "all"', 'if False else "all"'),
        ("everything is clipped tensor by tensor", 'if run.clip != "tensor":', "if False:"),
        (
            "the prototypes of patches count as projector",
            '(("prototypes.", "patch_prototypes."))',
            '(("prototypes.",))',
        ),
    ),
    *_in(
        "trainer.py",
        (
            "prototypes are never frozen",
            'return self.run.freeze_by if step < self.freeze_steps else "nothing"',
            'return "nothing"',
        ),
        ("prototypes are frozen a step longer", "step < self.freeze_steps", "step <= self.freeze_steps"),
        (
            "the teacher's momentum is constant",
            "rise(method.ema or 0.0, method.ema_end,",
            "rise(method.ema or 0.0, method.ema or 0.0,",
        ),
        ("the teacher is never updated", "        self.learner.update_teacher(float(self.momentum[step]))\n", ""),
        (
            "the teacher moves before the student",
            "        self.optimizer.step()\n        self.learner.update_teacher(float(self.momentum[step]))\n",
            "        self.learner.update_teacher(float(self.momentum[step]))\n        self.optimizer.step()\n",
        ),
        ("gradients are not clipped", "        clip_gradients(self.learner.student, self.run)\n", ""),
        ("gradients of steps add up", "        self.optimizer.zero_grad()\n        outs = []", "        outs = []"),
        ("parts of a batch are added, not averaged", "(out.loss / run.accumulate).backward()", "out.loss.backward()"),
        ("norms and biases get the decay too", 'self.weight_decay[step] * group["decays"]', "self.weight_decay[step]"),
        ("factors of the learning rate are ignored", 'self.lr[step] * group["lr_factor"]', "self.lr[step]"),
        ("stochastic depth ignores the step", 'number(run.seed, "network", step)', 'number(run.seed, "network")'),
        ("the rehearsal leaves a trace", "        self.undo()\n        if not auto:", "        if not auto:"),
        ("a step that is not finite is taken", "            if bad:\n", "            if False:\n"),
        ("gradients that are not finite are taken", "bad = ~(finite & torch", "bad = ~(finite | torch"),
        (
            "a skipped step leaves its centers",
            "        self.undo()\n        self.bad,",
            "        self.bad,",
        ),
        ("each rank decides for itself to skip", "flags = ranks.largest(torch.stack(", "flags = (torch.stack("),
        tests=("trainer", "train"),
    ),
    *_in(
        "train.py",
        (
            "a resumed run starts with a fresh optimizer",
            '*sharding.to_load(learner, optimizer), what["hash"]',
            'learner, None, what["hash"]',
        ),
        ("metrics after the checkpoint are kept", "log.rewind(trainer.done)", "log.rewind(trainer.steps)"),
        ("a diverged network is saved", "            trainer.check_weights()\n", ""),
        ("an interrupted run saves nothing", "if trainer.done > saved:", "if False:"),
        ("an unfinished step is saved", "            trainer.undo()\n", ""),
        tests=("train", "trainer"),
    ),
    *_in(
        "settings.py",
        ("the seed is no part of the hash", 'MACHINE = ("device",', 'MACHINE = ("seed", "device",'),
        tests=("train",),
    ),
    *_in(
        "batches.py",
        ("views ignore the step", 'generator(self.run.seed, "views", step)', 'generator(self.run.seed, "views")'),
        (
            "the order of images is that of every epoch",
            'generator(self.run.seed, "order", epoch)',
            'generator(self.run.seed, "order")',
        ),
        ("masks of patches are not stratified", "stratified=patch.stratified", "stratified=False"),
        ("the probability of a mask is always a half", "masked=patch.probability", "masked=0.5"),
        ("the least area of a block is the default", "min_area=patch.min_area", "min_area=None"),
        (
            "every rank sees the first slice",
            "start = (part * ranks.world() + ranks.rank()) * self.size",
            "start = part * ranks.world() * self.size",
        ),
        tests=("trainer", "batches"),
    ),
    *_in(
        "checkpoints.py",
        (
            "the optimizer is not saved",
            '"optimizer.safetensors": _optimizer_tensors(optimizer)',
            '"optimizer.safetensors": {}',
        ),
        ("no older checkpoint is kept", 'if good >= keep and step < state["step"]:', 'if step < state["step"]:'),
        (
            "the student's prototypes in place of the teacher's",
            '_strip(tensors, f"{network}.{patch}prototypes.")',
            '_strip(tensors, f"student.{patch}prototypes.")',
        ),
        ("a backbone comes back in train mode", "return backbone.eval()", "return backbone"),
        tests=("checkpoints", "train"),
    ),
    *_in(
        "masks.py",
        ("as many patches are kept as should be dropped", ".view(grid) >= kept", ".view(grid) < kept"),
        ("stratified ratios are drawn independently", "if not stratified:", "if True:"),
        ("a block may exceed the quota", "fits & (new > 0) & (new <= remaining)", "fits & (new > 0)"),
    ),
    *_in(
        "views.py",
        (
            "local crops with the scale of global ones",
            "(self.local_size, self.local_scale,",
            "(self.local_size, self.global_scale,",
        ),
        ("every global crop is the first", "(self.first, *further)", "(self.first,) * self.n_global"),
        (
            "normalized in the wrong order",
            "torch.sub(x, mean, out=out).div_(std)",
            "torch.div(x, std, out=out).sub_(mean)",
        ),
        ("the flip is drawn and forgotten", "size, crops.flip.flatten(), images.device", "size, None, images.device"),
    ),
    *_in(
        "resampling.py",
        ("no antialiasing", "scale * (out + 0.5), scale.clamp_min(1)", "scale * (out + 0.5), torch.ones_like(scale)"),
        ("pixels beside the crop shine in", "& (pixel >= 0) & (pixel < length[..., None])", ""),
        (
            "a kernel depends on the widest of the batch",
            " * (offset.abs() <= reach[:, None])\n",
            "\n",
        ),
        tests=("views",),
    ),
    *_in(
        "photometric.py",
        (
            "images come back in the order of their colors",
            "return torch.index_select(x, 0, where.argsort().to(x.device), out=spare)",
            "return x",
        ),
        ("contrast around the mean of the batch", "rows.mean(2, keepdim=True)", "rows.mean((0, 2), keepdim=True)"),
        ("jitter in one order for all", "operation, len(operations)), len(operations))", "0, 4), len(operations))"),
        tests=("views",),
    ),
    *_in(
        "batches.py",
        (
            "ranks cut the batch and parts cut the ranks",
            "start = (part * ranks.world() + ranks.rank()) * self.size",
            "start = (ranks.rank() * self.run.accumulate + part) * self.size",
        ),
        (
            "every part is the first",
            "masks = masks[:, own].flatten(0, 1)",
            "masks = masks[:, : self.size].flatten(0, 1)",
        ),
        (
            "reading ahead never stops",
            "min(now + 1 + self.run.workers, self.steps * parts)",
            "now + 1 + self.run.workers",
        ),
        (
            "an image may come twice an epoch",
            "torch.randperm(len(self.images),",
            "torch.randint(N := len(self.images), (N,),",
        ),
    ),
    *_in(
        "evaluate/knn.py",
        ("kNN ignores its temperature", "similarity[:, :1]) / temperature)", "similarity[:, :1]) / 0.07)"),
        ("kNN by products of raw features", "bank = directions(train.x.to(device))", "bank = train.x.to(device)"),
        ("Wilson's interval at 90 %", "z: float = 1.96", "z: float = 1.645"),
    ),
    *_in(
        "evaluate/features.py",
        ("features in train mode", "backbone.eval().to(device)", "backbone.to(device)"),
    ),
    *_in(
        "sweeps.py",
        ("the worst k is reported", 'max(row["knn"], key=', 'min(row["knn"], key='),
        (
            "kNN of training images in place of test images",
            'for split in (run.split, "test")',
            "for split in (run.split, run.split)",
        ),
        ("rows in the order in which runs end", "rows[i] = row", "rows[done - 1] = row"),
        ("a divergence is no part of its row", '"diverged": step,', '"diverged": None,'),
    ),
]
