import torch

from aligndet_cli.detectors.parts.cells import gather_cells


def test_gathered_cells_follow_the_order_asked_for() -> None:
    maps = [torch.arange(24.0).view(2, 2, 2, 3), 100 + torch.arange(4.0).view(2, 2, 1, 1)]
    # image 1, cell 6 = the only cell of the second map; image 0, cell 4 = row 1, column 1 of the first; ...
    found = gather_cells(maps, torch.tensor([1, 0, 1]), torch.tensor([6, 4, 0]))
    assert found.tolist() == [[102, 103], [4, 10], [12, 18]]


def test_maps_without_a_chosen_cell_get_a_zero_gradient() -> None:
    maps = [torch.zeros(1, 2, 2, 2, requires_grad=True), torch.zeros(1, 2, 1, 1, requires_grad=True)]
    empty = torch.zeros(0, dtype=torch.int64)
    gather_cells(maps, empty, empty).sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in maps)
