"""Faults in the doctor and the meter, for mutations.py; see faults.py."""

from fault import Fault, planted_in

DOCTOR: list[Fault] = [
    *planted_in(
        "collapse/pairs.py",
        ("a pair is seen from one side only", "torch.maximum(own[i], theirs[cell])", "own[i]"),
        (
            "a crowded prototype joins the last group, not the first",
            "leader[inside] = np.minimum(leader[inside], np.append(kept_ranks, free)[first])",
            "leader[inside] = np.append(kept_ranks, free)[first]",
        ),
        ("pairs at a distance of exactly eps", "kept = self._graph.data < eps", "kept = self._graph.data <= eps"),
        ("groups are apart that are not", "row < radius[m] + radius)", "row < radius)"),
    ),
    *planted_in(
        "collapse/sphere.py",
        ("a prototype is its own neighbor by chance", "np.exp((k - 1) * log_below)", "np.exp(k * log_below)"),
        ("singular values are eigenvalues", "power if squared else power.sqrt()", "power"),
    ),
    *planted_in(
        "official/heads.py",
        (
            "weight_g scales what is not a direction",
            "rows.copy_(directions(rows).mul_(g[i : i + _ROWS]))",
            "rows.copy_(rows * g[i : i + _ROWS])",
        ),
        (
            "every last_layer2 is an alias",
            'if layer == "last_layer2" and first and _equal(first, parts):',
            'if layer == "last_layer2" and first:',
        ),
        ("the student is told first", 'order = {"teacher": 0, "student": 1}', 'order = {"teacher": 1, "student": 0}'),
        tests=("official_heads",),
    ),
    *planted_in(
        "official/projectors.py",
        (
            "MSN's statistics are mixed up",
            '_MSN = {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6}',
            '_MSN = {"fc1": 0, "bn2": 1, "fc2": 3, "bn1": 4, "fc3": 6}',
        ),
        ("SwAV's projector bends softly", '"relu" if prefix == "projection_head" else "gelu"', '"gelu"'),
        tests=("official_heads",),
    ),
    *planted_in(
        "files/foreign.py",
        ("a flipped bit in a zip file is read", "if 0 < len(bad) < len(infos):", "if False:"),
        tests=("official_heads",),
    ),
    *planted_in(
        "doctor/data.py",
        (
            "the least used prototypes are called the most used",
            "order = torch.argsort(held.double() + p.double() / 2, stable=True).numpy()",
            "order = torch.argsort(held.double() + p.double() / 2, stable=True, descending=True).numpy()",
        ),
        (
            "the first M prototypes stand for the unique ones",
            "few = scores[:, unique.representatives]",
            "few = scores[:, : unique.count]",
        ),
        (
            "the void set lies where the data are",
            "void = void_set(w, codes, seen.eps)",
            "void = void_set(-w, codes, seen.eps)",
        ),
        tests=("doctor_data",),
    ),
    *planted_in(
        "doctor/subject.py",
        (
            "the student's prototypes are the file's first",
            '(s.network != "teacher", s.of != "crops")',
            '(s.network == "teacher", s.of != "crops")',
        ),
        tests=("doctor",),
    ),
    *planted_in(
        "doctor/examination.py",
        ("the vMF paper's threshold is another", "PPC, VMF = 0.025, 0.1", "PPC, VMF = 0.025, 0.2"),
        tests=("doctor",),
    ),
    *planted_in(
        "doctor/report.py",
        (
            "a stranger's page is overwritten",
            "if there and not (there <= {PAGE, NUMBERS} and _is_report(folder)):",
            "if there and not there <= {PAGE, NUMBERS}:",
        ),
        tests=("doctor_page",),
    ),
    *planted_in(
        "meters.py",
        ("the running marginal is the batch's", "MOMENTUM * self.marginal + (1 - MOMENTUM) * target", "target"),
        ("shared prototypes count as shared memory", "if method.shared_prototypes else ()", "if False else ()"),
        (
            "the codes measured are one process's",
            "codes = ranks.rows(torch.cat([wide(out.codes) for out in outs]))",
            "codes = torch.cat([wide(out.codes) for out in outs])",
        ),
        tests=("train_meters",),
    ),
    *planted_in(
        "train.py",
        ("a run that goes on has forgotten its meters", ', "meters": trainer.meters.state()', ""),
        tests=("train_meters",),
    ),
    *planted_in(
        "records.py",
        (
            "a finding is said again with each row",
            'if finding.kind not in {known["kind"] for known in self.findings}:',
            "if True:",
        ),
        tests=("train_meters",),
    ),
    *planted_in(
        "blockwise.py",
        ("the mean target is a sum", "-(usage * log_usage).sum(), usage\n", "-(usage * log_usage).sum(), usage * n\n"),
    ),
    *planted_in(
        "live/run.py",
        (
            "half a line of metrics is taken for a row",
            "if isinstance(found := _parsed(line), dict)]",
            "if (found := _parsed(line))]",
        ),
        tests=("live",),
    ),
    *planted_in(
        "live/panels.py",
        (
            "a curve loses its peaks",
            "{min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}",
            "{min(stretch, key=lambda p: p[1]), stretch[0]}",
        ),
        tests=("live",),
    ),
    *planted_in(
        "event_files.py",
        ("event files lack what was before", "        for row in rows:\n            self.write(row)\n", ""),
    ),
    *planted_in(
        "collapse/measures.py",
        (
            "targets are normalized over the images",
            "            p = torch.softmax(p, -1)",
            "            p = torch.softmax(p, 0)",
        ),
        (
            "one tensor that is shared is no shared memory",
            "bool(shared) and (len(shared) == len(ours) or any(p.requires_grad for p in shared))",
            "len(shared) == len(ours)",
        ),
        tests=("meter",),
    ),
    *planted_in(
        "collapse/diagnosis.py",
        ("a slow teacher is a dead one", "still = [moved <= 1e-6 * lag", "still = [moved <= 1e-2 * lag"),
    ),
    *planted_in(
        "collapse/meter.py",
        ("findings are repeated", "if finding.kind not in known)", "if True)"),
    ),
]
