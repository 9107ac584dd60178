import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from prototypes_lib import checkpoints
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.train import Run, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    method = METHODS["dino-vmf"].but(n_prototypes=16, views=Views(2, 0))
    settings = Run.small(
        limit=32, batch_size=16, epochs=1.0, warmup_epochs=0.0, hidden=16, bottleneck=8,
        out=str(tmp_path_factory.mktemp("runs")), progress=False,
    )  # fmt: skip
    return train(method, settings, "x")


def test_prototypes_and_backbone_come_back_from_a_run_and_from_its_export(finished, tmp_path):
    out = checkpoints.export(finished.folder, tmp_path / "export")
    w = checkpoints.load_prototypes(finished.folder)
    assert w.shape == (16, 8) and torch.equal(w, checkpoints.load_prototypes(out))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        a, b = (checkpoints.load_backbone(p)(x)[0] for p in (finished.folder, out))
    assert torch.equal(a, b)


def test_a_loaded_backbone_is_in_eval_mode(finished):
    assert not any(module.training for module in checkpoints.load_backbone(finished.folder).modules())


def test_an_export_speaks_timms_and_dinos_names(finished, tmp_path):
    out = checkpoints.export(finished.folder, tmp_path / "export")
    backbone, head = load_file(out / "backbone.safetensors"), load_file(out / "head.safetensors")
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "norm.bias"} <= set(backbone) & set(reference)
    assert head["last_layer.weight_g"].shape == (16, 1) and head["last_layer.weight_v"].shape == (16, 8)
    assert {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")} <= set(head)
    assert json.loads((out / "about.json").read_text())["method"]["score"] == "scores.vmf"


def test_student_and_teacher_are_told_apart(finished):
    student, teacher = (checkpoints.load_prototypes(finished.folder, n) for n in ("student", "teacher"))
    assert not torch.equal(student, teacher)


def test_a_method_without_prototypes_says_so(tmp_path):
    method = METHODS["simdino"].but(views=Views(2, 0), ema=None)
    settings = Run.small(
        limit=32, batch_size=16, epochs=1.0, warmup_epochs=0.0, hidden=16, bottleneck=8, out=str(tmp_path),
        progress=False,
    )  # fmt: skip
    run = train(method, settings, "sim")
    with pytest.raises(ValueError, match="no prototypes"):
        checkpoints.load_prototypes(run.folder)
    assert checkpoints.load_backbone(run.folder).dim == 64
    assert checkpoints.export(run.folder, tmp_path / "export").is_dir()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for call in (checkpoints.load_prototypes, checkpoints.load_backbone, lambda p: checkpoints.export(p, p / "e")):
        with pytest.raises(FileNotFoundError, match="neither a run folder"):
            call(tmp_path)


def test_a_checkpoint_that_was_cut_off_while_written_is_not_seen(finished):
    aside = finished.folder / "checkpoints" / ".step-00000009.1"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    assert 9 not in checkpoints.steps(finished.folder)


def test_nothing_of_ours_is_a_pickle(finished):
    kinds = {p.suffix for p in finished.folder.rglob("*") if p.is_file() and not p.name.startswith("half")}
    assert kinds <= {".json", ".jsonl", ".csv", ".safetensors"}


def test_an_export_never_overwrites_anything_but_an_export(finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for path in (tmp_path / "mine", finished.folder):
        before = sorted(p.name for p in path.iterdir())
        with pytest.raises(ValueError, match="is no export"):
            checkpoints.export(finished.folder, path)
        assert sorted(p.name for p in path.iterdir()) == before
    for _ in range(2):
        checkpoints.export(finished.folder, tmp_path / "again")


def test_a_wrong_network_is_refused(finished, tmp_path):
    for load in (checkpoints.load_prototypes, checkpoints.load_backbone):
        with pytest.raises(ValueError, match="techer"):
            load(finished.folder, "techer")
    with pytest.raises(ValueError, match="teacher only"):
        checkpoints.load_prototypes(checkpoints.export(finished.folder, tmp_path / "e"), "student")


def test_shared_prototypes_are_exported(tmp_path):
    method = METHODS["dino-vmf"].but(n_prototypes=16, views=Views(2, 0), shared_prototypes=True)
    settings = Run.small(
        limit=32, batch_size=16, epochs=1.0, warmup_epochs=0.0, hidden=16, bottleneck=8, out=str(tmp_path),
        progress=False,
    )  # fmt: skip
    run = train(method, settings, "shared")
    out = checkpoints.export(run.folder, tmp_path / "export")
    assert torch.equal(checkpoints.load_prototypes(out), checkpoints.load_prototypes(run.folder, "student"))


def test_batchnorms_statistics_survive_a_run_and_its_export(tmp_path):
    settings = Run.small(
        backbone="resnet_pico", limit=32, batch_size=16, epochs=2.0, warmup_epochs=0.0, hidden=16, bottleneck=8,
        out=str(tmp_path), progress=False,
    )  # fmt: skip
    run = train(METHODS["dino"].but(n_prototypes=16, views=Views(2, 0)), settings, "resnet")
    out = checkpoints.export(run.folder, tmp_path / "export")
    loaded, again = (checkpoints.load_backbone(p) for p in (run.folder, out))
    assert load_file(out / "backbone.safetensors").keys() == loaded.cnn.state_dict().keys()
    for one, other in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert int(loaded.cnn.bn1.num_batches_tracked) > 0 and float(loaded.cnn.bn1.running_mean.abs().max()) > 0


@pytest.mark.slow
def test_a_patch_head_of_its_own_is_exported_and_read(tmp_path):
    method = METHODS["dinov2"].but(n_prototypes=12, views=Views(2, 1))
    run = Run.small(limit=64, batch_size=32, epochs=1.0, warmup_epochs=0.0, out=tmp_path, progress=False, device="cpu")
    result = train(method, run, "dinov2")
    assert result.last["M_patches"] <= 12
    checkpoints.export(result.folder, tmp_path / "export")
    for path in (result.folder, tmp_path / "export"):
        crops, patches = (checkpoints.load_prototypes(path, of=of) for of in ("crops", "patches"))
        assert crops.shape == patches.shape and not torch.equal(crops, patches)
    with pytest.raises(ValueError, match="crops"):
        checkpoints.load_prototypes(train(METHODS["simdino"].but(views=Views(2, 1)), run, "sim").folder, of="patches")
