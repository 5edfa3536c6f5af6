import numpy as np
import pytest

from aligndet_cli.proposals.segmentation import edge_strength, segment, segment_exactly


def edges_of(pixels: np.ndarray, steps: list) -> list:
    """Pairs of neighbouring pixels by rising distance."""
    height, width = pixels.shape[:2]
    edges = []
    for row, column in np.ndindex(height, width):
        for down, right in steps:
            other = (row + down, column + right)
            if other[0] < height and 0 <= other[1] < width:
                weight = float(np.sqrt(((pixels[row, column] - pixels[other]) ** 2).sum()))
                edges.append((weight, (row, column), other))
    return sorted(edges, key=lambda edge: edge[0])


def joined_by_hand(pixels: np.ndarray, steps: list, scale: float, min_size: int) -> np.ndarray:
    """Felzenszwalb & Huttenlocher's rule: regions are sets of pixels."""
    region = {pixel: {pixel} for pixel in np.ndindex(*pixels.shape[:2])}
    inner = {id(members): 0.0 for members in region.values()}

    def join(first: set, second: set, weight: float) -> None:
        first |= second
        inner[id(first)] = weight
        region.update(dict.fromkeys(second, first))

    edges = edges_of(pixels, steps)
    for weight, one, other in edges:
        first, second = region[one], region[other]
        limits = [inner[id(members)] + scale / len(members) for members in (first, second)]
        if first is not second and weight < min(limits):
            join(first, second, weight)
    for weight, one, other in edges:
        first, second = region[one], region[other]
        if first is not second and min(len(first), len(second)) < min_size:
            join(first, second, weight)
    numbers: dict[int, int] = {}
    labels = [numbers.setdefault(id(region[pixel]), len(numbers)) for pixel in np.ndindex(*pixels.shape[:2])]
    return np.array(labels).reshape(pixels.shape[:2])


@pytest.mark.parametrize("scale", [0.3, 0.6])
def test_exact_segmentation_follows_the_rule(scale):
    pixels = np.random.default_rng(3).random((9, 12, 3))
    expected = joined_by_hand(pixels, [(0, 1), (1, -1), (1, 0), (1, 1)], scale, min_size=4)
    assert 3 < expected.max() + 1 < 40
    np.testing.assert_array_equal(segment_exactly(pixels, scale, 4), expected)


def test_fast_segmentation_follows_the_rule_with_four_neighbours():
    # Whole numbers up to 4095 keep their order when weights are rounded to 1/4096 of the largest.
    pixels = np.random.default_rng(4).permutation(4096)[:108].reshape(9, 12, 1).astype(np.float32)
    expected = joined_by_hand(pixels, [(0, 1), (1, 0)], 3000.0, min_size=4)
    assert 3 < expected.max() + 1 < 40
    np.testing.assert_array_equal(segment(pixels, np.array([3000.0]), 4)[0], expected)


def test_larger_scales_give_larger_regions_made_of_the_smaller_ones():
    pixels = np.random.default_rng(5).random((30, 40, 3)).astype(np.float32)
    small, large = segment(pixels, np.array([0.5, 3.0]), 1)
    assert large.max() < small.max()
    for region in range(small.max() + 1):
        assert len(np.unique(large[small == region])) == 1


def test_regions_are_numbered_by_their_first_pixel_and_none_is_too_small():
    pixels = np.random.default_rng(6).random((30, 40, 3)).astype(np.float32)
    labels = segment(pixels, np.array([0.5]), 12)[0]
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all()
    assert np.bincount(labels.ravel()).min() >= 12


def test_uniform_image_is_one_region():
    assert segment(np.full((20, 30, 3), 7, dtype=np.float32), np.array([10.0]), 5)[0].max() == 0


def test_label_maps_of_the_authors_segmentation(shared_data, soco_reference):
    import cv2

    from aligndet_cli.data.images import read_image

    for entry in soco_reference["images"][:2]:
        image = read_image(shared_data / "minicoco/train2017" / entry["file"])
        pixels = cv2.GaussianBlur(image / 255.0, (9, 9), 0.9, borderType=cv2.BORDER_REFLECT)
        stem = entry["file"].removesuffix(".jpg")
        with np.load(shared_data.parent / f"golden/g4_selective_search/seg_{stem}.npz") as arrays:
            np.testing.assert_array_equal(segment_exactly(pixels, 300 / 255, 100), arrays["segments"])


def test_edge_strength_is_the_length_of_the_gradient():
    # Channel 0 rises by 3 per column and channel 1 by 4 per row; central differences span two pixels: 6 and 8, so 10.
    rows, columns = np.mgrid[:5, :6].astype(np.float32)
    strength = edge_strength(np.stack([3 * columns, 4 * rows], axis=-1))
    np.testing.assert_allclose(strength[1:-1, 1:-1], 10)
    # At the left edge only one column is spanned: hypot(3, 8).
    np.testing.assert_allclose(strength[1:-1, 0], np.hypot(3, 8), rtol=1e-6)
