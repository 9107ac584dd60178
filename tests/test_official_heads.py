"""Prototypes and projectors out of files of every layout, with planted copies and void sets; or one clear line."""

import gzip
import json
import math
import os
import pickle

import memory
import official_files
import pytest
import torch
from official_files import LAYOUTS, NO_PROTOTYPES, OWN_PATCHES, WITH_STUDENT, make, planted
from safetensors.torch import save_file

from prototypes_lib import checkpoints, collapse, official
from prototypes_lib.files.foreign import read_pickle
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.train import Run, train

PLANTED = planted([5, 1, 1, 30, 2, *[1] * 12], 24, void=9)
OTHER = planted([3, 3, 4, *[1] * 7], 24, seed=1)
HELD = [layout for layout in LAYOUTS if layout not in NO_PROTOTYPES]
LAYOUT = {
    "dino-k4096": "DINO, names of before its release", "dinov2": "DINOv2, teacher_checkpoint",
    "swav": "SwAV", "msn": "MSN", "ibot": "iBOT", "webssl": "heads alone (WebSSL)", "dino": "DINO, full checkpoint",
}  # fmt: skip


def told(layout):
    return next(text for name, text in LAYOUT.items() if layout.startswith(name))


def same_count(found, truth):
    unique = collapse.unique_prototypes(found.w)
    return unique.count == truth.m and tuple(unique.redundancy.tolist()) == truth.redundancy


@pytest.mark.parametrize("layout", HELD)
def test_every_layouts_prototypes_are_those_that_were_planted(layout, tmp_path):
    found = official.prototypes(make(layout, tmp_path, PLANTED.w), "teacher")[0]
    assert found.w.dtype == torch.float32 and torch.allclose(found.w, PLANTED.w, rtol=1e-6, atol=0)
    assert same_count(found, PLANTED) and sum(PLANTED.redundancy) == len(found.w)
    assert collapse.unique_prototypes(found.w, 0.1).count == PLANTED.m == collapse.connected_components(found.w)
    void = collapse.void_set(found.w, PLANTED.codes)
    assert void.count == 9 and torch.equal(void.mask, PLANTED.void)
    assert (found.network, found.layout, found.dtype) == ("teacher", told(layout), "float32")
    assert found.of == ("head 0" if layout == "swav-heads" else "crops")
    assert found.score == ("cosine" if layout.startswith(("swav", "msn")) else "dot")


@pytest.mark.parametrize("layout", WITH_STUDENT)
def test_student_and_teacher_are_told_apart(layout, tmp_path):
    path = make(layout, tmp_path, PLANTED.w, student=OTHER.w)
    sets = official.prototypes(path)
    assert [found.network for found in sets if found.of == "crops"] == ["teacher", "student"]
    student = official.prototypes(path, "student")
    assert all(found.network == "student" for found in student) and same_count(student[0], OTHER)
    assert torch.allclose(checkpoints.load_prototypes(path, "student"), OTHER.w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", sorted(set(HELD) - set(WITH_STUDENT) - {"msn", "msn-self"}))
def test_a_single_network_has_no_student(layout, tmp_path):
    with pytest.raises(ValueError, match="no student"):
        official.prototypes(make(layout, tmp_path, PLANTED.w), "student")


def test_msns_prototypes_are_of_both_networks_and_told_once(tmp_path):
    for layout in ("msn", "msn-self"):
        path = make(layout, tmp_path, PLANTED.w)
        (found,) = official.prototypes(path)
        assert (found.network, found.tensor) == ("teacher", "prototypes") and "share" in found.notes[0]
        assert official.prototypes(path, "student")[0].network == "student"


@pytest.mark.parametrize("layout", OWN_PATCHES)
def test_patches_with_prototypes_of_their_own_are_a_set_of_their_own(layout, tmp_path):
    path = make(layout, tmp_path, PLANTED.w, patches=OTHER.w)
    crops, patches = official.prototypes(path, "teacher")
    assert (crops.of, patches.of) == ("crops", "patches") and not crops.notes
    assert same_count(crops, PLANTED) and same_count(patches, OTHER)
    assert torch.equal(checkpoints.load_prototypes(path, of="patches"), patches.w)


def test_prototypes_that_ibots_patches_share_are_told_once(tmp_path):
    for dtype in (torch.float32, torch.float16):  # as one tensor under two names, and as two equal ones
        teacher, student = official.prototypes(make("ibot", tmp_path, PLANTED.w, dtype=dtype))
        assert (teacher.network, student.network) == ("teacher", "student")
        assert all("patches share" in found.notes[-1] for found in (teacher, student))
    with pytest.raises(ValueError, match=r"no prototypes of='patches'; it has those of crops"):
        checkpoints.load_prototypes(make("ibot", tmp_path, PLANTED.w), of="patches")
    (tied,) = official.prototypes(make("dinov2-tied", tmp_path, PLANTED.w))
    assert "no ibot_head" in tied.notes[0]


def test_each_of_swavs_heads_is_a_set(tmp_path):
    path = make("swav-heads", tmp_path, PLANTED.w, patches=OTHER.w)
    first, second = official.prototypes(path)
    assert (first.of, second.of) == ("head 0", "head 1") and same_count(first, PLANTED) and same_count(second, OTHER)
    assert torch.equal(checkpoints.load_prototypes(path, of="head 1"), second.w)
    with pytest.raises(ValueError, match="those of head 0, head 1"):
        checkpoints.load_prototypes(path)


def test_ten_and_more_heads_stay_in_their_order(tmp_path):
    heads = {f"prototypes.prototypes{i}.weight": torch.randn(i + 2, 4) for i in range(12)}
    torch.save(heads, tmp_path / "x.pth")
    assert [(found.of, len(found.w)) for found in official.prototypes(tmp_path / "x.pth")] == [
        (f"head {i}", i + 2) for i in range(12)
    ]


@pytest.mark.parametrize("layout", ["dino", "msn", "swav", "dinov2"])
def test_other_precisions_are_read_as_float32_and_told(layout, tmp_path):
    for dtype, error in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-6)):
        found = official.prototypes(make(layout, tmp_path, PLANTED.w, dtype=dtype))[0]
        name = str(dtype).removeprefix("torch.")
        assert found.w.dtype == torch.float32 and found.dtype == name and f"stored in {name}" in "; ".join(found.notes)
        assert torch.allclose(found.w, PLANTED.w, rtol=error, atol=error) and same_count(found, PLANTED)


def test_frozen_lengths_are_noticed(tmp_path):
    unit = torch.nn.functional.normalize(PLANTED.w, dim=1)
    made = official_files.content("dino", unit)
    made["teacher"]["head.last_layer.weight_g"] = torch.ones(len(unit), 1)
    torch.save(made, tmp_path / "x.pth")
    teacher, student = official.prototypes(tmp_path / "x.pth")
    assert teacher.notes == ("weight_g is 1 everywhere: norm_last_layer",) and student.notes == ()
    assert torch.allclose(teacher.w, unit, atol=1e-6)


def test_the_plain_last_layer_of_dinos_resnet_is_noticed(tmp_path):
    found = official.prototypes(make("dino-resnet50", tmp_path, PLANTED.w))[0]
    assert torch.equal(found.w, PLANTED.w) and "without weight normalization" in found.notes[0]


def test_a_negative_length_turns_a_prototype_round(tmp_path):
    made = official_files.content("dino", PLANTED.w)
    made["teacher"]["head.last_layer.weight_g"] *= -1
    torch.save(made, tmp_path / "x.pth")
    assert torch.allclose(official.prototypes(tmp_path / "x.pth")[0].w, -PLANTED.w, rtol=1e-6, atol=0)


def test_the_prototypes_are_pytorchs_own_under_both_kinds_of_weight_norm(tmp_path):
    for norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        torch.manual_seed(0)
        layer = norm(torch.nn.Linear(8, 20, bias=False))
        for parameter in layer.parameters():
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        wanted = layer(torch.eye(8)).T
        torch.save({f"head.last_layer.{name}": x for name, x in layer.state_dict().items()}, tmp_path / "x.pth")
        assert torch.allclose(official.prototypes(tmp_path / "x.pth")[0].w, wanted, atol=1e-6)


def test_both_networks_of_lightlys_state_are_found(tmp_path):
    def head(w):
        made = official_files.content("webssl-flat", w)
        return {name.removeprefix("dino_head."): x for name, x in made.items() if name.startswith("dino_head.")}

    state = {f"teacher_head.{name.replace('mlp', 'layers')}": x for name, x in head(PLANTED.w).items()}
    state |= {f"student_head.{name.replace('mlp', 'layers')}": x for name, x in head(OTHER.w).items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    teacher, student = official.prototypes(tmp_path / "x.ckpt")
    assert (teacher.network, student.network, teacher.layout) == ("teacher", "student", "lightly")
    assert same_count(teacher, PLANTED) and same_count(student, OTHER)
    assert same_count(official.prototypes(tmp_path / "x.ckpt", "student")[0], OTHER)
    codes = official.projector(tmp_path / "x.ckpt", "student")(torch.randn(3, 64))
    assert torch.allclose(codes.norm(dim=1), torch.ones(3), atol=1e-6)


# ------------------------------------------------------------------------------------------ nothing to count


@pytest.mark.parametrize("layout", NO_PROTOTYPES)
def test_files_without_prototypes_say_why(layout, tmp_path):
    path = make(layout, tmp_path, PLANTED.w)
    says = "SimDINO has no prototypes; nothing to count" if layout == "simdino" else "a backbone alone, no prototypes"
    for read in (official.prototypes, checkpoints.all_prototypes, checkpoints.load_prototypes):
        one_line(read, path, says)


def one_line(read, path, says):
    with pytest.raises(ValueError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def spoiled(layout, name, change):
    made = official_files.content(layout, PLANTED.w)
    box = made.get("teacher", made)
    box[name] = change(box[name].clone())
    return made


def put(value, rows=(3, 7)):
    def change(x):
        x[list(rows)] = value
        return x

    return change


W_G, W_V = "head.last_layer.weight_g", "head.last_layer.weight_v"
WRONG = {
    "not finite": (spoiled("dino", W_V, put(math.nan)), "weight_v of the teacher 2 are not"),
    "infinite": (spoiled("dino", W_G, put(math.inf)), "2 are not finite"),
    "infinite, plain": (spoiled("msn", "prototypes", put(-math.inf, [0])), "1 are not finite"),
    "zero": (spoiled("dino", W_G, put(0.0)), "2 are zero"),
    "zero direction": (spoiled("dino", W_V, put(0.0, [59])), "1 are zero"),
    "zero, plain": (spoiled("swav", "module.prototypes.weight", put(0.0)), "2 are zero"),
    "half of a weight norm": ({"teacher": {W_V: torch.ones(3, 2)}}, "but not the other of weight_g and weight_v"),
    "other half": ({"teacher": {W_G: torch.ones(3, 1)}}, "but not the other"),
    "lengths of others": (spoiled("dino", W_G, lambda x: x[:5]), r"weight_g is \(5, 1\), but there are 60"),
    "of whole numbers": (spoiled("msn", "prototypes", lambda x: x.long()), r"\(60, 24\) of torch\.int64"),
    "a vector": (spoiled("msn", "prototypes", lambda x: x[0]), r"prototypes is \(24,\)"),
    "none": (spoiled("msn", "prototypes", lambda x: x[:0]), r"prototypes is \(0, 24\)"),
    "an unknown head": ({"nose.last_layer.weight": torch.ones(2, 2)}, r"nose\.last_layer\.weight is in none"),
    "one FSDP share": ({"teacher": {"dino_head._flat_param": torch.ones(9)}}, "FSDP run"),
    "tensors twice": ({"head.last_layer.weight": torch.ones(2, 2), "module.head.last_layer.weight": torch.ones(2, 2)},
                      "twice"),
    "no tensors": ({"epoch": 3}, "no tensors where weights"),
    "something else": ({"lstm.weight": torch.ones(2)}, r"no prototypes, only 1 tensors \(lstm\.weight\)"),
    "MSN's encoder alone": ({"target_encoder": {"module.cls_token": torch.ones(1, 1, 4)}}, "MSN without its proto"),
    "a list": ([torch.ones(3)], "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_counted_is_one_line(case, tmp_path):
    content, says = WRONG[case]
    torch.save(content, tmp_path / "x.pth")
    one_line(official.prototypes, tmp_path / "x.pth", says)


# ------------------------------------------------------------------------------------------ parts, names, damage


def test_parts_of_a_checkpoint_say_what_to_do(tmp_path):
    weights = {"head.last_layer.weight": PLANTED.w.clone()}
    for name in ("checkpoint-00001-of-00003.pth", "model-00002-of-00003.safetensors", "checkpoint-00001-of-00003"):
        (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
        for read in (official.prototypes, official.load, checkpoints.load_prototypes):
            one_line(read, tmp_path / name, r"part \d of 3 .* join its parts first")
    torch.save(weights, tmp_path / "model-00001-of-00001.pth")  # the whole
    assert same_count(official.prototypes(tmp_path / "model-00001-of-00001.pth")[0], PLANTED)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    for read in (official.prototypes, checkpoints.load_prototypes, checkpoints.load_backbone):
        one_line(read, index, "lists the parts")
        one_line(read, tmp_path, "in parts")
    torch.save(weights, tmp_path / "model_0001249.rank_0.pth")
    one_line(official.prototypes, tmp_path / "model_0001249.rank_0.pth", "take the consolidated teacher_checkpoint")
    folder = tmp_path / "distributed"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"x")
    (folder / "__0_0.distcp").write_bytes(b"x")
    for path in (folder, folder / "__0_0.distcp"):
        one_line(checkpoints.all_prototypes, path, "dcp_to_torch_save")


@pytest.mark.parametrize("name", ["x", "x.pth", "x.pth.tar", "x.safetensors", "x.bin", "x.ckpt", "weights.v2"])
def test_what_a_file_is_follows_from_its_content(name, tmp_path):
    made = official_files.content("webssl-flat", PLANTED.w)
    for write in (lambda path: torch.save(made, path), lambda path: save_file(made, path),
                  lambda path: torch.save(made, path, _use_new_zipfile_serialization=False)):  # fmt: skip
        write(tmp_path / name)
        assert same_count(official.prototypes(tmp_path / name)[0], PLANTED)


class Malicious:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("name", ["x", "x.pth", "x.pth.tar", "x.safetensors", "model.bin"])
def test_nothing_in_a_file_is_run(name, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / name
    made = official_files.content("dino", PLANTED.w)
    for content in (made | {"args": Malicious(canary)}, made | {"teacher": made["teacher"] | {"x": Malicious(canary)}}):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            for read in (official.prototypes, official.projector, checkpoints.all_prototypes):
                one_line(read, path, r"asks for (posix|nt)\.mkdir, which is no data")
    path.write_bytes(pickle.dumps({"teacher": Malicious(canary)}))
    one_line(official.prototypes, path, r"asks for (posix|nt)\.mkdir")
    assert not canary.exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert canary.exists(), "the file would have done it"


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_damaged_files_are_one_line(name, tmp_path):
    made, path = official_files.content("webssl-flat", PLANTED.w), tmp_path / name
    for write in (lambda: torch.save(made, path), lambda: save_file(made, path),
                  lambda: torch.save(made, path, _use_new_zipfile_serialization=False)):  # fmt: skip
        write()
        whole = path.read_bytes()
        for share in (0.0, 1e-3, 0.1, 0.5, 0.9, 0.999):
            path.write_bytes(whole[: int(share * len(whole))])
            one_line(official.prototypes, path, "fetch it again|no plain checkpoint")
    for rest in (b"<!DOCTYPE html><html>Quota exceeded</html>", b"version https://git-lfs.github.com/spec/v1\noid",
                 gzip.compress(whole), b"no checkpoint at all", bytes(5000)):  # fmt: skip
        path.write_bytes(rest)
        one_line(official.prototypes, path, "fetch|unpack|no plain|cut off|fetch it again")
    with pytest.raises(FileNotFoundError, match="not there"):
        official.prototypes(tmp_path / "none.pth")


def test_a_flipped_bit_among_the_prototypes_is_noticed(tmp_path):
    path = make("msn", tmp_path, PLANTED.w)
    whole = bytearray(path.read_bytes())
    whole[bytes(whole).index(PLANTED.w.numpy().tobytes()) + 1001] ^= 4
    path.write_bytes(whole)
    for read in (official.prototypes, official.load):
        one_line(read, path, "damaged, by its checksum")


def test_files_written_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = make("msn", tmp_path, PLANTED.w)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same_count(official.prototypes(path)[0], PLANTED)


def test_prototypes_and_projector_outlive_their_file(tmp_path):
    for layout in ("msn", "dinov2"):
        path = make(layout, tmp_path, PLANTED.w)
        found, head = official.prototypes(path)[0], official.projector(path)
        x = torch.randn(4, 64)
        w, codes = found.w.clone(), head(x)
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert torch.equal(found.w, w) and torch.equal(head(x), codes)


def test_tensors_left_on_the_disk_are_those_of_the_file(tmp_path):
    path = make("dino", tmp_path, PLANTED.w)
    there, here = read_pickle(path, on_disk=True), read_pickle(path)
    assert there.keys() == here.keys() and there["args"] == here["args"]
    for name, x in here["teacher"].items():
        assert torch.equal(x, there["teacher"][name])


@pytest.mark.slow
def test_131072_prototypes_are_read_in_little_more_than_their_own_memory(tmp_path):
    w = torch.randn(131_072, 384)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(100, 1024, 1024)}}}  # 400 MB that no one asks for
    head = {"dino_head.last_layer.weight_g": w.norm(dim=1, keepdim=True), "dino_head.last_layer.weight_v": w}
    torch.save({"teacher": head, "optimizer": optimizer}, tmp_path / "x.pth")
    program = (
        "import sys, torch; from memory import peak; from prototypes_lib import official; torch.set_num_threads(1)\n"
        "before = peak()\n"
        "found, = official.prototypes(sys.argv[1])\n"
        "print(len(found.w), peak() - before)"
    )
    del w, head, optimizer
    k, megabytes = map(float, memory.run(program, tmp_path / "x.pth").stdout.split())
    assert k == 131_072 and megabytes < 650, f"{megabytes:.0f} MB for 201 MB of prototypes"


# ------------------------------------------------------------------------------------------ projectors


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def by_hand(tensors, steps, x):
    """What an official head does, written out: "l NAME" is a linear layer, "b NAME" BatchNorm with its statistics."""
    for step in steps.split(", "):
        kind, _, name = step.partition(" ")
        p = {part: tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
             if f"{name}.{part}" in tensors}  # fmt: skip
        if kind == "l":
            x = x @ p["weight"].T + p["bias"]
        elif kind == "b":
            x = (x - p["running_mean"]) / (p["running_var"] + 1e-5).sqrt() * p["weight"] + p["bias"]
        else:
            x = gelu(x) if kind == "gelu" else x.clamp_min(0)
    return x / x.norm(dim=1, keepdim=True)


DINO = "l {0}0, gelu, l {0}2, gelu, l {0}4"
BN = "l {0}0, b {0}1, gelu, l {0}3, b {0}4, gelu, l {0}6"
HEADS = {
    "dino": ("teacher", "crops", DINO.format("head.mlp.")),
    "dino-bn": ("teacher", "crops", BN.format("module.head.mlp.")),
    "dino-parametrized": ("teacher", "crops", DINO.format("_orig_mod.module.head.mlp.")),
    "dino-resnet50": ("teacher", "crops", "l {0}0, b {0}1, gelu, l {0}3".format("head.mlp.")),
    "dino-k4096": ("teacher", "crops", DINO.format("head.projection_head.")),
    "ibot": ("teacher", "patches", DINO.format("head.mlp.")),
    "msn": ("target_encoder", "crops",
            "l {0}fc1, b {0}bn1, gelu, l {0}fc2, b {0}bn2, gelu, l {0}fc3".format("module.fc.")),
    "swav": ("", "crops", "l {0}0, b {0}1, relu, l {0}3".format("module.projection_head.")),
    "swav-self": ("state_dict", "crops", "l {0}0, b {0}1, relu, l {0}3".format("module.projection_head.")),
    "swav-heads": ("", "head 1", "l {0}0, b {0}1, relu, l {0}3".format("module.projection_head.")),
    "dinov2": ("teacher", "patches", DINO.format("ibot_head.mlp.")),
    "dinov2-tied": ("teacher", "patches", DINO.format("dino_head.mlp.")),
    "webssl": ("teacher", "crops", DINO.format("dino_head.mlp.")),
    "webssl-flat": ("", "patches", DINO.format("ibot_head.mlp.")),
    "simdino": ("teacher", "crops", DINO.format("head.mlp.")),
}  # fmt: skip


@pytest.mark.parametrize("layout", HEADS)
@torch.no_grad()
def test_a_projector_computes_what_the_official_head_does(layout, tmp_path):
    box, of, steps = HEADS[layout]
    path = make(layout, tmp_path, PLANTED.w, features=128)
    content = torch.load(path, weights_only=False)
    tensors = content[box] if box else content
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    head = official.projector(path, of=of)
    assert torch.initial_seed() == 1 and not head.training
    codes = head(x)
    assert torch.allclose(codes, by_hand(tensors, steps, x), atol=1e-5)
    assert codes.shape == (7, 24) and torch.allclose(codes.norm(dim=1), torch.ones(7), atol=1e-6)
    assert torch.allclose(head(x[:1]), codes[:1], atol=1e-6), "a code depends on the rest of its batch"


def test_the_students_projector_is_another(tmp_path):
    for layout in ("dino", "msn-self"):
        path, x = make(layout, tmp_path, PLANTED.w), torch.randn(3, 64)
        teacher, student = (official.projector(path, network)(x) for network in ("teacher", "student"))
        assert not torch.allclose(teacher, student, atol=0.1)
    with pytest.raises(ValueError, match="no student"):
        official.projector(make("msn", tmp_path, PLANTED.w), "student")


def test_a_projector_of_one_layer_and_of_no_biases_is_known(tmp_path):
    single = {"head.mlp.weight": torch.randn(4, 6), "head.mlp.bias": torch.randn(4)}
    torch.save(single, tmp_path / "x.pth")
    x = torch.randn(5, 6)
    assert torch.allclose(official.projector(tmp_path / "x.pth")(x), by_hand(single, "l head.mlp", x), atol=1e-6)
    bare = {f"dino_head.mlp.{2 * i}.weight": torch.randn(6, 6) for i in range(3)}
    torch.save(bare, tmp_path / "x.pth")
    zeros = {name.replace("weight", "bias"): torch.zeros(6) for name in bare}
    wanted = by_hand(bare | zeros, DINO.format("dino_head.mlp."), x)
    assert torch.allclose(official.projector(tmp_path / "x.pth")(x), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("dino_head.mlp.2.weight"), r"layers at \[0, 2, 4\], which is no projector"),
        (lambda t: t.update({"dino_head.mlp.3.weight": torch.ones(24)}), r"layers at \[0, 2, 3, 4\]"),
        (lambda t: t.update({"dino_head.mlp.2.weight": torch.ones(24, 9)}), "do not fit one another"),
        (lambda t: t.update({"dino_head.mlp.2.bias": torch.ones(9)}), r"mlp\.2\.bias is \(9,\), not \(24,\)"),
    ],
)
def test_a_head_that_is_none_of_these_is_one_line(change, says, tmp_path):
    made = official_files.content("webssl-flat", PLANTED.w)
    change(made)
    torch.save(made, tmp_path / "x.pth")
    one_line(official.projector, tmp_path / "x.pth", says)


def test_wrong_words_and_missing_heads_are_refused(tmp_path):
    path = make("dino-backbone", tmp_path, PLANTED.w)
    one_line(official.projector, path, "holds no projector")
    with pytest.raises(ValueError, match="of='heads': choose"):
        official.projector(path, of="heads")
    for read in (official.prototypes, official.projector, checkpoints.load_prototypes):
        with pytest.raises(ValueError, match="mother"):
            read(path, "mother")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["dino", "dino-resnet50", "dino-k4096", "ibot", "msn", "swav-self", "dinov2"])
def test_backbone_projector_and_prototypes_of_a_file_fit_together(layout, tmp_path):
    """A void set planted where this network's codes are not."""
    path = make(layout, tmp_path, PLANTED.w)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = official.projector(path)(official.load(path)(images)[0])
    w = PLANTED.w.clone()
    w[10:20] = -2 * codes.mean(0) / codes.mean(0).norm() + 0.01 * torch.randn(10, 24)
    (found, *_) = official.prototypes(make(layout, tmp_path, w))
    codes = official.projector(path)(official.load(path)(images)[0])
    void = collapse.void_set(found.w, codes)
    assert bool(void.mask[10:20].all()) and void.count < 30


# ------------------------------------------------------------------------------------------ runs and exports


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    settings = Run.small(
        limit=32, batch_size=16, epochs=1.0, warmup_epochs=0.0, hidden=16, bottleneck=8,
        out=str(tmp_path_factory.mktemp("runs")), progress=False,
    )  # fmt: skip
    changes = {"n_prototypes": 16, "views": Views(2, 0)}
    return {name: train(METHODS[name].but(**changes), settings, name).folder for name in ("dino-vmf", "ibot", "msn")}


@pytest.mark.slow
def test_all_sets_of_a_run_and_of_its_export_are_told(runs, tmp_path):
    out = checkpoints.export(runs["dino-vmf"], tmp_path / "export")
    teacher, student = checkpoints.all_prototypes(runs["dino-vmf"])
    (exported,) = checkpoints.all_prototypes(out)
    assert [f.layout for f in (teacher, exported)] == ["run of this library", "export of this library"]
    assert (teacher.network, student.network, exported.network) == ("teacher", "student", "teacher")
    assert teacher.tensor == "teacher.prototypes.weight_v" and exported.tensor == "last_layer.weight_v"
    assert (teacher.of, teacher.score, teacher.dtype) == ("crops", "dot", "float32")
    assert torch.allclose(teacher.w, checkpoints.load_prototypes(runs["dino-vmf"]), rtol=1e-6)
    assert torch.allclose(student.w, checkpoints.load_prototypes(runs["dino-vmf"], "student"), rtol=1e-6)
    assert torch.equal(exported.w, teacher.w)
    for name in ("head.safetensors", "backbone.safetensors", "about.json"):
        assert torch.equal(checkpoints.all_prototypes(out / name)[0].w, teacher.w)
    part = next((runs["dino-vmf"] / "checkpoints").glob("step-*")) / "model.safetensors"
    one_line(checkpoints.all_prototypes, part, "is a part of a run; give the run folder")


def test_what_is_shared_in_a_run_is_told_once(runs):
    (msn,) = checkpoints.all_prototypes(runs["msn"])
    assert (msn.network, msn.score) == ("teacher", "cosine") and "teacher and student share" in msn.notes[-1]
    ibot = checkpoints.all_prototypes(runs["ibot"])
    assert [(f.network, f.of) for f in ibot] == [("teacher", "crops"), ("student", "crops")]
    assert all("patches share these prototypes" in f.notes for f in ibot)


def test_a_folder_that_is_none_of_these_is_refused(tmp_path):
    for read in (checkpoints.all_prototypes, checkpoints.load_prototypes):
        with pytest.raises(FileNotFoundError):
            read(tmp_path)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.pth")
