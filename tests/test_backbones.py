import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from prototypes_lib import stochastic_depth
from prototypes_lib.backbones import Backbone, ConvolutionalBackbone, TransformerBackbone
from prototypes_lib.batch_norm import BatchNorm2d


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_pico_patch8", TransformerBackbone), ("resnet_pico", ConvolutionalBackbone)]
)
def test_the_name_picks_the_class_also_for_a_copy(name, kind):
    backbone = Backbone(name, 32).eval()
    assert type(backbone) is kind and isinstance(backbone, Backbone)
    twin = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 32, 32)
    assert type(twin) is kind and torch.equal(twin(x)[0], backbone(x)[0])


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"init_values": 1e-5}, {"class_token": True, "depth": 3}])
def test_features_equal_timms_own_forward_at_any_size(options):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2} | options
    backbone = Backbone("vit_tiny_patch16_224", 64, **small).eval()
    for size in (64, 32, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            cls, patches = backbone(x)
            own = backbone.vit.forward_features(x)
        assert torch.allclose(cls, own[:, 0], atol=1e-6)
        assert torch.allclose(patches, own[:, backbone.vit.num_prefix_tokens :], atol=1e-6)


def test_weights_come_out_with_timms_names():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    theirs.load_state_dict(backbone.vit.state_dict())


def test_a_masked_patch_is_not_seen():
    torch.manual_seed(0)
    backbone = Backbone("vit_pico_patch8", 32).eval()
    x = torch.randn(1, 3, 32, 32)
    # the 3 x 3 stem reaches one pixel into the neighbor, so change the inside of the masked patch only
    changed = x.clone()
    changed[:, :, 2:6, 2:6] += 10.0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    with torch.no_grad():
        assert not torch.allclose(backbone(x)[0], backbone(changed)[0], atol=1e-3)
        backbone.vit.patch_embed.norm = torch.nn.Identity()  # a norm over the image would tell the others
        assert torch.allclose(backbone(x, mask)[0], backbone(changed, mask)[0], atol=1e-6)
        assert not torch.allclose(backbone(x, mask)[0], backbone(x)[0], atol=1e-4)


def test_official_positions_are_dinos_interpolation():
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", 224, interpolation="official", embed_dim=32, depth=1, num_heads=2)
    grid = backbone.vit.pos_embed[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(6.1 / 14, 6.1 / 14), mode="bicubic")
    assert expected.shape[-2:] == (6, 6)
    assert torch.allclose(backbone._positions((6, 6)), expected.flatten(2).mT, atol=1e-7)
    plain = Backbone("vit_tiny_patch16_224", 224, embed_dim=32, depth=1, num_heads=2)
    plain.load_state_dict(backbone.state_dict())
    assert not torch.allclose(plain._positions((6, 6)), backbone._positions((6, 6)), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Backbone("vit_pico_patch8", 30), "multiple"),
        (lambda: Backbone("resnetv2_50", 224), "vit_"),
        (lambda: Backbone("resnet_pico", 32, reg_tokens=4), "reg_tokens"),
        (lambda: Backbone("resnet50", 16), "16 px"),
        (lambda: Backbone("resnet_pico", 32, interpolation="bilinear"), "interpolation"),
        (lambda: Backbone("vit_nothing", 224), "vit_nothing"),
        (lambda: Backbone("vit_pico_patch8", 32, interpolation="bilinear"), "interpolation"),
    ],
)
def test_a_wrong_request_names_itself(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.slow)]
)
def test_transformers_of_another_build_are_refused(name):
    with pytest.raises(ValueError, match="plain transformers"):
        Backbone(name, 64)


def test_the_residual_stream_stays_float32_under_autocast():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2).eval()
    seen = []
    backbone.vit.blocks[1].register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 64, 64))
    assert seen == [torch.float32]


def test_keeping_all_patches_is_no_keep():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2, reg_tokens=2).eval()
    x, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    with torch.no_grad():
        for m in (None, mask):
            for one, other in zip(backbone(x, m), backbone(x, m, torch.arange(16)), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("registers", [0, 3])
def test_dropping_equals_assembling_the_tokens_by_hand(registers):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2, reg_tokens=registers).eval()
    vit, keep = backbone.vit, torch.tensor([9, 2, 14, 5, 0])
    x, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    torch.nn.init.normal_(backbone.mask_token)
    rows = []
    with torch.no_grad():
        cls, patches = backbone(x, mask, keep)
        for image, hidden in zip(x, mask, strict=True):
            tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
            tokens += [vit.reg_token[0, r] + vit.pos_embed[0, 1 + r] for r in range(registers)]
            for index in keep.tolist():
                row, column = divmod(index, 4)
                pixels = image[:, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
                embedded = vit.patch_embed.proj.weight.flatten(1) @ pixels.flatten() + vit.patch_embed.proj.bias
                token = backbone.mask_token[0] if hidden[row, column] else embedded
                tokens.append(token + vit.pos_embed[0, 1 + registers + index])
            rows.append(torch.stack(tokens))
        expected = vit.norm(vit.blocks(torch.stack(rows)))
    assert patches.shape == (2, 5, 32)
    assert torch.allclose(cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(patches, expected[:, 1 + registers :], atol=1e-5)


def test_pixels_of_dropped_patches_do_not_matter():
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2).eval()
    x = torch.randn(2, 3, 64, 64)
    changed = x.clone()
    changed[:, :, :16, 16:32] += 10.0  # patch 1
    keep = torch.tensor([0, 2, 3, 8])
    with torch.no_grad():
        assert not torch.allclose(backbone(x)[0], backbone(changed)[0], atol=1e-3)
        for one, other in zip(backbone(x, keep=keep), backbone(changed, keep=keep), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_resnet50_is_timms_with_the_last_map_as_patches():
    torch.manual_seed(0)
    backbone = Backbone("resnet50", 32).eval().double()  # to tell rounding from a difference
    theirs = timm.create_model("resnet50", num_classes=0).eval().double()
    theirs.load_state_dict(backbone.cnn.state_dict())
    x = torch.randn(2, 3, 33, 64, dtype=torch.float64)
    with torch.no_grad():
        features, patches = backbone(x)
        assert features.shape == (2, 2048) and backbone.dim == 2048
        assert torch.allclose(features, theirs(x), atol=1e-10, rtol=1e-10)
        assert torch.allclose(patches, theirs.forward_features(x).flatten(2).mT, atol=1e-10, rtol=1e-10)
    assert patches.shape[1] == backbone.grid(33)[0] * backbone.grid(64)[1] == 4
    assert torch.allclose(patches.mean(1), features, atol=1e-10)


def test_residual_branches_of_a_resnet_start_alive_as_torchvisions():
    x = torch.randn(4, 3, 32, 32)
    for name, size in (("resnet_pico", 32), ("resnet18", 32)):
        backbone = Backbone(name, size)
        backbone(x)[0].square().sum().backward()
        assert all(float(p.grad.abs().max()) > 0 for p in backbone.parameters())


def test_batch_norm_of_a_resnet_is_over_all_processes():
    kinds = {type(module) for module in Backbone("resnet_pico", 32).modules()}
    assert BatchNorm2d in kinds and torch.nn.BatchNorm2d not in kinds


def test_the_small_resnet_takes_the_crops_of_small_images():
    backbone = Backbone("resnet_pico", 32, drop_path_rate=0.1)
    for size in (16, 24, 32):
        features, patches = backbone(torch.randn(2, 3, size, size))
        rows, columns = backbone.grid(size)
        assert features.shape == (2, backbone.dim) and patches.shape == (2, rows * columns, backbone.dim)
    assert any(getattr(module, "drop_prob", 0.0) for module in backbone.modules())


@pytest.mark.parametrize("hiding", [{"mask": torch.zeros(2, 2, 2, dtype=torch.bool)}, {"keep": torch.arange(2)}])
def test_a_resnet_refuses_masks_and_drops_in_one_line(hiding):
    backbone = Backbone("resnet_pico", 32)
    assert backbone.mask_token is None
    with pytest.raises(ValueError, match="convolutional backbones cannot drop or mask patches") as caught:
        backbone(torch.randn(2, 3, 32, 32), **hiding)
    assert "\n" not in str(caught.value)


def test_layers_of_a_transformer_count_from_the_patches_to_the_norm():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=3, num_heads=2, reg_tokens=2)
    assert backbone.n_layers == 3
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    first = {"mask_token", "vit.cls_token", "vit.pos_embed", "vit.reg_token"}
    first |= {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}
    assert {name for name, layer in layers.items() if layer == 0} == first
    for i in range(3):
        assert {n for n, layer in layers.items() if layer == i + 1} == {n for n in layers if f".blocks.{i}." in n}
    assert {name for name, layer in layers.items() if layer == 4} == {"vit.norm.weight", "vit.norm.bias"}


@pytest.mark.parametrize("name", ["resnet_pico", "resnet50d"])
def test_layers_of_a_resnet_are_its_stem_and_its_stages(name):
    backbone = Backbone(name, 32)
    assert backbone.n_layers == 4
    layers = {parameter: backbone.layer_of(parameter) for parameter, _ in backbone.named_parameters()}
    assert {p.split(".")[1] for p, layer in layers.items() if layer == 0} == {"conv1", "bn1"}
    for i in range(1, 5):
        assert {p.split(".")[1] for p, layer in layers.items() if layer == i} == {f"layer{i}"}


def test_features_of_a_resnet_are_float32_under_autocast():
    backbone = Backbone("resnet_pico", 32).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, patches = backbone(torch.randn(2, 3, 32, 32))
    assert features.dtype == patches.dtype == torch.float32


def test_stochastic_depth_rises_with_depth_or_is_uniform():
    rates = lambda net: [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.vit.blocks]
    rising = Backbone("vit_nano_patch8", 32, drop_path_rate=0.3)
    uniform = Backbone("vit_nano_patch8", 32, drop_path_rate=0.3, uniform_drop_path=True)
    assert rates(rising) == pytest.approx([0.0, 0.1, 0.2, 0.3]) and rates(uniform) == [0.3] * 4


@contextlib.contextmanager
def bytes_kept(network):
    """Counts the bytes of tensors kept for the backward pass, and of what goes into the blocks, which are kept too."""
    seen = {}
    keep = lambda x: seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
    hooks = [b.register_forward_pre_hook(lambda _, args: keep(args[0]) and None) for b in network.vit.blocks]
    for parameter in network.parameters():
        keep(parameter)
    before = len(seen)
    count = lambda: sum(s.nbytes() for s in list(seen.values())[before:])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (keep(x), x)[1], lambda x: x):
        yield count
    for hook in hooks:
        hook.remove()


def gradients(network, x, seed=0):
    network.zero_grad()
    with stochastic_depth.at(seed, len(x)):
        features, patches = network(x)
    (features.square().sum() + patches.sin().sum()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_recomputing_gives_the_same_gradients_for_a_fraction_of_the_memory():
    options = {"embed_dim": 64, "depth": 6, "num_heads": 2, "drop_path_rate": 0.4, "proj_drop_rate": 0.1}
    network = Backbone("vit_tiny_patch16_224", 64, **options).train()
    x, found, kept, names = torch.randn(8, 3, 64, 64), [], [], list(network.state_dict())
    for recompute in (False, True):
        network.recompute = recompute
        torch.manual_seed(0)  # of the dropout
        with bytes_kept(network) as count:
            network(x)
        kept.append(count())
        torch.manual_seed(0)
        found.append(gradients(network, x))
    assert list(network.state_dict()) == names
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert kept[1] < 0.25 * kept[0], kept


def test_recomputed_blocks_meet_their_own_masks_when_two_calls_come_before_one_backward():
    network, x = Backbone("vit_nano_patch8", 32, drop_path_rate=0.5).train(), torch.randn(6, 3, 32, 32)
    found = []
    for recompute in (False, True):
        network.recompute = recompute
        network.zero_grad()
        with stochastic_depth.at(1, 6):
            loss = network(x)[0].square().sum() + network(x[..., :16, :16])[0].sum()
        with stochastic_depth.at(2, 6):
            loss = loss + network(x)[1].sin().sum()
        loss.backward()
        found.append([p.grad.clone() for p in network.vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputing_a_resnet_counts_the_statistics_of_a_batch_once():
    network = Backbone("resnet_pico", 32, drop_path_rate=0.5).train()
    twin, x = copy.deepcopy(network), torch.randn(6, 3, 32, 32)
    twin.recompute = True
    one, other = gradients(network, x), gradients(twin, x)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for (name, a), b in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "ahead"), [(False, False), (True, False), (True, True)])
def test_compiled_blocks_equal_eager_ones_in_few_programs_whatever_the_rows_and_sizes(recompute, ahead):
    programs = []

    def compiler(graph, inputs):
        programs.append(graph)
        return make_boxed_func(graph) if ahead else graph

    options = {"embed_dim": 32, "depth": 4, "num_heads": 2, "drop_path_rate": 0.3}
    student = Backbone("vit_tiny_patch16_224", 64, **options).train()
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    eager, names = copy.deepcopy(student), list(student.state_dict())
    student.recompute = recompute
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler) if ahead else compiler
    student.compile_blocks(backend=backend)
    teacher.compile_blocks(backend=backend)
    assert list(student.state_dict()) == names
    for step, (rows, size) in enumerate([(8, 64), (12, 32), (16, 64), (20, 32), (9, 64), (31, 32), (10, 96)]):
        x = torch.randn(rows, 3, size, size)
        mask = torch.rand(rows, size // 16, size // 16) < torch.rand(())
        if step == 2:
            warm = len(programs)
        ours, theirs = gradients(student, x, step), gradients(eager, x, step)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(teacher(x, mask)[0], eager.eval()(x, mask)[0], atol=1e-5)
        eager.train()
    assert len(programs) == warm, "rows, kept rows and sizes change without a new program"
    assert warm <= (5 if ahead else 3), "with and without dropped rows, forward and backward, and the teacher's"
    torch._dynamo.reset()


def test_a_copy_of_compiled_blocks_is_not_compiled_and_a_resnet_refuses():
    called = []
    backend = lambda graph, inputs: called.append(1) or graph
    network = Backbone("vit_pico_patch8", 32)
    network.compile_blocks(backend=backend)
    twin = copy.deepcopy(network)
    twin(torch.randn(2, 3, 32, 32))
    assert not called
    with pytest.raises(ValueError, match="vision transformers"):
        Backbone("resnet_pico", 32).compile_blocks()


def test_attention_is_fused_in_timms_transformers_and_plain_in_ours_with_the_same_result():
    real, ours = Backbone("vit_tiny_patch16_224", 64, depth=1), Backbone("vit_pico_patch8", 32).eval()
    assert all(block.attn.fused_attn for block in real.vit.blocks)
    assert not any(block.attn.fused_attn for block in ours.vit.blocks)
    x = torch.randn(2, 3, 32, 32)
    plain = ours(x)[0]
    for block in ours.vit.blocks:
        block.attn.fused_attn = True
    assert torch.allclose(ours(x)[0], plain, atol=1e-5)
