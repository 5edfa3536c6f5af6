import pytest
import torch

from aligndet_cli.detectors.parts.fpn import FPN


@pytest.mark.parametrize("extra", ["from_c5", "from_p5"])
@pytest.mark.parametrize(
    ("norm", "num_norms", "has_bias"), [("none", 0, True), ("batch", 8, False), ("group", 8, False)]
)
def test_fpn_norms_every_convolution_or_none(norm: str, num_norms: int, has_bias: bool, extra: str) -> None:
    fpn = FPN({"c3": 3, "c4": 5, "c5": 7}, 32, norm, extra_levels=extra)
    convs = [module for module in fpn.modules() if isinstance(module, torch.nn.Conv2d)]
    norms = [module for module in fpn.modules() if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm)]
    assert (len(convs), len(norms)) == (8, num_norms)
    assert all((conv.bias is not None) == has_bias for conv in convs)
    maps = {"c2": torch.zeros(2, 1, 16, 24), "c3": torch.randn(2, 3, 8, 12), "c4": torch.randn(2, 5, 4, 6)}
    sizes = [tuple(level.shape) for level in fpn({**maps, "c5": torch.randn(2, 7, 2, 3)})]
    assert sizes == [(2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3), (2, 32, 1, 2), (2, 32, 1, 1)]


def test_a_pooled_level_is_every_other_cell_of_p5() -> None:
    fpn = FPN({"c4": 3, "c5": 5}, 4, "batch", extra_levels="pooled")
    assert sum(isinstance(module, torch.nn.Conv2d) for module in fpn.modules()) == 4
    _, p5, p6 = fpn({"c4": torch.randn(2, 3, 6, 10), "c5": torch.randn(2, 5, 3, 5)})
    assert torch.equal(p6, p5[:, :, ::2, ::2])


@pytest.mark.parametrize(("extra", "p6_is", "p7_is"), [("from_c5", -1, -1), ("from_p5", -3, 0)])
def test_extra_levels_come_from_where_they_should(extra: str, p6_is: int, p7_is: int) -> None:
    # C5 is -1, the lateral triples it and all else copies. Of C5: P6 = P7 = -1. Of P5 = -3: P7 = relu(P6) = 0.
    fpn = FPN({"c5": 1}, 1, "none", extra_levels=extra)
    for conv in (module for module in fpn.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    fpn.pyramid.inner_blocks[0][0].weight.data *= 3
    p5, p6, p7 = fpn({"c5": torch.full((1, 1, 4, 4), -1.0)})
    assert (p5.unique().tolist(), p6.unique().tolist(), p7.unique().tolist()) == ([-3], [p6_is], [p7_is])


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 1), (1, 2), (2, 2)])
def test_extra_levels_of_narrow_maps_have_gradients_in_bfloat16(size: tuple[int, int]) -> None:
    fpn = FPN({"c5": 8}, 64, "none", extra_levels="from_p5")
    maps = {"c5": torch.randn(2, 8, *size)}
    gradients = []
    for is_enabled in (True, False):
        for _ in range(5):  # what is not initialized by torch holds NaN sometimes, not always
            fpn.zero_grad()
            torch.full((1_000_000,), torch.nan)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                levels = fpn(maps)
            sum(level.float().square().sum() for level in levels).backward()
            found = torch.cat([weight.grad.flatten() for weight in fpn.parameters()])
            assert found.isfinite().all()
        gradients.append(found)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * gradients[1].abs().max().item())
