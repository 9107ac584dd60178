import copy

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import nn

from prototypes_lib import ranks, stochastic_depth
from prototypes_lib.backbones import Backbone

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def transformer(rate=0.5, **options):
    torch.manual_seed(0)
    return Backbone("vit_tiny_patch16_224", 32, **SMALL, drop_path_rate=rate, **options).double()


def images(n, size=32):
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(network, x, run=None):
    network.zero_grad()
    features, patches = (run or network)(x)
    (features.square().sum() + patches.sin().sum()).backward()
    return [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]


def dense(network, x, masks):
    """What timm computes, x + mask / keep * branch(x) with every branch on every row, for masks of each branch."""
    vit, masks = network.vit, iter(masks)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block in vit.blocks:
        rate = block.drop_path1.drop_prob
        weight = lambda rate=rate: next(masks).double()[:, None, None] / (1 - rate) if rate else 1.0
        x = x + weight() * block.ls1(block.attn(block.norm1(x)))
        x = x + weight() * block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    return x[:, 0], x[:, vit.num_prefix_tokens :]


def drawn(network, x):
    """The masks of the next call, as rows of True where a branch is computed."""
    found = []
    for kept in stochastic_depth.draw(network.vit.blocks, network.vit.patch_embed(x)):
        for rows in kept or ():
            mask = torch.zeros(len(x), dtype=torch.bool)
            if rows is not None:
                mask[rows[0][rows[1] > 0]] = True
                found.append(mask)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.5, "reg_tokens": 2}, {"uniform_drop_path": True}, {"qk_norm": True}]
)
def test_given_the_masks_output_and_gradients_are_timms_formula(options):
    network, x = transformer(**options).train(), images(8)
    with stochastic_depth.at(3, 8):
        masks = drawn(network, x)
    with stochastic_depth.at(3, 8):
        ours = gradients(network, x)
    theirs = gradients(network, x, lambda x: dense(network, x, masks))
    assert 0 < sum(int(m.sum()) for m in masks) < 8 * len(masks)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_only_the_rows_that_keep_a_branch_compute_it():
    network, x, seen = transformer(uniform_drop_path=True).train(), images(16), []
    for block in network.vit.blocks:
        for module in (block.norm1, block.attn, block.norm2, block.mlp):
            module.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    with stochastic_depth.at(0, 16):
        masks = drawn(network, x)
    with stochastic_depth.at(0, 16):
        network(x)
    assert seen == [int(m.sum()) for m in masks for _ in range(2)]
    assert sum(seen) < 0.7 * 16 * len(seen)


def test_a_branch_is_kept_with_its_probability_and_weighted_by_the_inverse():
    blocks = nn.ModuleList(Block(4, 1, drop_path=rate) for rate in (0.0, 0.1, 0.4))
    stochastic_depth.prepare(blocks)
    rows, calls = 64, 400
    with stochastic_depth.at(5, rows):
        kept = [stochastic_depth.draw(blocks, torch.zeros(rows, 2, 4)) for _ in range(calls)]
    assert all(block[0] is None for block in kept)
    for i, rate in ((1, 0.1), (2, 0.4)):
        for branch in range(2):
            weights = torch.cat([call[i][branch][1] for call in kept])
            assert torch.allclose(weights, torch.tensor(1 / (1 - rate)), rtol=1e-6)
            n = rows * calls
            assert abs(len(weights) / n - (1 - rate)) < 4 * (rate * (1 - rate) / n) ** 0.5
    pairs = [(set(c[2][0][0].tolist()), set(c[2][1][0].tolist())) for c in kept]
    both = sum(len(a & b) for a, b in pairs) / (rows * calls)
    assert abs(both - 0.36) < 0.02, "the branches of a block are independent"


def test_the_mean_over_draws_of_a_linear_branch_is_the_branch():
    block = Block(4, 1, drop_path=0.3)
    block.norm1 = block.norm2 = block.mlp = nn.Identity()
    block.attn = nn.Linear(4, 4, bias=False)
    stochastic_depth.prepare([block])
    x = torch.randn(4, 2, 4).repeat(4000, 1, 1)
    with torch.no_grad():
        outs = [stochastic_depth.run(block, x, stochastic_depth.draw([block], x)[0]) for _ in range(3)]
        expected = 2 * (x[:4] + block.attn(x[:4]))
        mean = torch.stack(outs).reshape(-1, 4, 2, 4).mean(0)
    assert float((mean - expected).abs().max()) < 0.1 and not torch.allclose(outs[0], outs[1])


def test_the_split_over_ranks_and_parts_changes_no_mask(monkeypatch):
    network, batch = transformer().train(), 8
    views = [images(batch), images(batch) + 1]
    with stochastic_depth.at(7, batch):
        whole = [network(torch.cat(views))[0].chunk(2), (network(views[1])[0],)]
    for world, parts in ((2, 1), (1, 2), (2, 2)):
        size, found = batch // (world * parts), {}
        for part in range(parts):
            for rank in range(world):
                monkeypatch.setattr(ranks, "world", lambda world=world: world)
                monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
                start = part * batch // parts + rank * size
                mine = [view[start : start + size] for view in views]
                with stochastic_depth.at(7, batch, part, parts):
                    calls = [network(torch.cat(mine))[0].chunk(2), (network(mine[1])[0],)]
                for call, outs in enumerate(calls):
                    for view, out in enumerate(outs):
                        found.setdefault((call, view), []).append(out)
        for (call, view), slices in found.items():
            torch.testing.assert_close(torch.cat(slices), whole[call][view], rtol=1e-12, atol=1e-12)


def test_masks_are_a_function_of_seed_and_call_and_leave_the_global_generator_alone():
    network, x = transformer().train(), images(8)
    state = torch.get_rng_state()
    outs = []
    for seed in (1, 1, 2):
        with stochastic_depth.at(seed, 8):
            outs += [network(x)[0], network(x)[0]]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[4])
    torch.manual_seed(3)
    first = network(x)[0]
    torch.manual_seed(3)
    assert torch.equal(network(x)[0], first), "outside `at`, the global generator decides"


@pytest.mark.parametrize("still", ["eval", "teacher", "rate 0"])
def test_where_nothing_is_dropped_it_is_timms_own_and_draws_nothing(still):
    network = transformer(0.0 if still == "rate 0" else 0.5).train()
    if still == "eval":
        network.eval()
    if still == "teacher":
        network = copy.deepcopy(network)
        for module in network.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    x, state = images(4), torch.get_rng_state()
    with stochastic_depth.at(0, 4):
        before = stochastic_depth._place.generator.get_state()
        out = network(x)[0]
        assert torch.equal(stochastic_depth._place.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, network.vit.forward_features(x)[:, 0])


def test_blocks_keep_timms_names_and_drop_rows_in_timms_own_forward_too():
    network = transformer().train()
    assert [type(b) for b in network.vit.blocks] == [stochastic_depth.SkippingBlock] * 3
    plain = Block(32, 2, qkv_bias=True)
    assert list(network.vit.blocks[2].state_dict()) == list(plain.state_dict())
    rates = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5])
    x = images(4)
    assert not torch.equal(network.vit.forward_features(x), network.vit.forward_features(x))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_branch_that_no_row_keeps_has_zeros_for_a_gradient(name, monkeypatch):
    network = transformer(uniform_drop_path=True) if name == "vit" else Backbone("resnet_pico", 32, drop_path_rate=0.5)
    blocks = network.vit.blocks if name == "vit" else network._blocks
    monkeypatch.setattr(stochastic_depth, "_uniform", lambda branches, rows: torch.zeros(branches, rows))
    network.train()
    x = images(4).to(next(network.parameters()).dtype)
    gradients(network, x)
    branch = blocks[-1].mlp.fc1.weight if name == "vit" else blocks[-1].conv1.weight
    assert branch.grad is not None and not branch.grad.any()
    if name == "vit":
        vit = network.vit
        features, _ = network(x)
        assert torch.equal(features, vit.norm(vit._pos_embed(vit.patch_embed(x)))[:, 0])


def test_autocast_keeps_the_residual_stream_in_float32():
    network, seen = transformer(uniform_drop_path=True).float().train(), []
    network.vit.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(images(4).float())[0].sum().backward()
    assert seen == [torch.float32]
    x = images(4).bfloat16()
    assert network.bfloat16()(x)[0].dtype == torch.bfloat16


def test_a_resnet_weights_the_rows_and_its_batch_norm_sees_all():
    torch.manual_seed(0)
    network = Backbone("resnet_pico", 32, drop_path_rate=0.5).train().double()
    theirs, x, seen = copy.deepcopy(network), images(6), []
    for block in network._blocks:
        block.bn2.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    with stochastic_depth.at(2, 6):
        kept = stochastic_depth.draw(network._blocks, x)
    assert [kept[0], *[len(k) for k in kept[1:]]] == [None, 1, 1, 1]
    for block, rows in zip(theirs._blocks, kept, strict=True):
        if rows is not None:
            mask = torch.zeros(6, dtype=torch.float64).index_copy(0, *rows[0])
            block.drop_path.forward = lambda x, mask=mask: x * mask[:, None, None, None]
    theirs_x = theirs.cnn.forward_features(x.contiguous(memory_format=torch.channels_last))
    with stochastic_depth.at(2, 6):
        _, patches = network(x)
    torch.testing.assert_close(patches, theirs_x.flatten(2).mT, rtol=1e-11, atol=1e-11)
    assert seen == [6] * 4


def test_a_resnets_masks_are_gone_after_their_call():
    network, x = Backbone("resnet_pico", 32, drop_path_rate=0.5).train(), images(6).float()
    network(x)
    network.eval()
    expected = network.cnn.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert all(path.kept is None for path in network.modules() if isinstance(path, stochastic_depth._Masked))
    assert torch.equal(network(x)[1], expected.flatten(2).mT)


def test_other_blocks_of_timm_weight_their_rows_too():
    block = ParallelThingsBlock(8, 2, num_parallel=2, drop_path=0.5).double().train()
    stochastic_depth.prepare([block])
    x = torch.randn(6, 3, 8, dtype=torch.float64)
    (kept,) = stochastic_depth.draw([block], x)
    assert len(kept) == 4
    out = stochastic_depth.run(block, x, kept)
    weights = [torch.zeros(6, dtype=torch.float64).index_copy(0, *rows)[:, None, None] for rows in kept]
    expected = x
    for weight, branches in ((weights[:2], block.attns), (weights[2:], block.ffns)):
        sides = [b.ls(getattr(b, "attn" if b in list(block.attns) else "mlp")(b.norm(expected))) for b in branches]
        expected = expected + sum(w * side for w, side in zip(weight, sides, strict=True))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_a_batch_that_does_not_fit_says_so_in_one_line():
    with pytest.raises(ValueError, match="10 images does not cut into 4 parts"), stochastic_depth.at(0, 10, 0, 4):
        pass
    network = transformer().train()
    with stochastic_depth.at(0, 4), pytest.raises(ValueError, match="6 rows are no whole number of views of 4"):
        network(images(6))
    assert stochastic_depth._place is None
