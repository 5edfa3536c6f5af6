from aligndet_cli.detectors.parts.anchors import AnchorGrid, base_anchors


def test_base_anchors_by_hand() -> None:
    # Sides of scale 4 and stride 8: 32. Ratio 4 (height / width): 16 wide, 64 high; ratio 1/4: 64 wide, 16 high.
    expected = [[-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32]]
    assert base_anchors(8, [4.0], [0.25, 1.0, 4.0]).tolist() == expected


def test_order_is_ratio_major_then_cells_by_row_then_levels() -> None:
    grid = AnchorGrid(strides=(8, 16), scales=(1.0, 2.0), ratios=(1.0,))
    anchors = grid([(2, 3), (1, 1)])
    assert anchors.shape == ((2 * 3 + 1) * 2, 4)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    # No half-cell offset: column * stride, row * stride.
    assert centers[::2].tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0]]
    assert (anchors[:, 2] - anchors[:, 0]).tolist() == [8, 16] * 6 + [16, 32]


def test_inside_counts_cells_of_the_image_padded_to_32() -> None:
    grid = AnchorGrid(strides=(16, 64), scales=(1.0,), ratios=(1.0,))
    # 33 x 20 pixels are padded to 64 x 32: 4 x 2 of the cells of stride 16, and the first of stride 64.
    inside, whole = grid.inside([(6, 4), (2, 1)], [(33, 20), (96, 64)])
    assert whole.all()
    assert inside[:24].view(6, 4).tolist() == [[True, True, False, False]] * 4 + [[False] * 4] * 2
    assert inside[24:].tolist() == [True, False]


def test_anchors_are_not_part_of_checkpoints() -> None:
    assert AnchorGrid((8,), (1.0,), (1.0,)).state_dict() == {}
