import math

import pytest
import torch

from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes


def test_offsets_by_hand() -> None:
    # Centre (5, 10) -> (10, 10), sides (10, 20) -> (20, 10): dx = 5 / 10, dy = 0, dw = ln 2, dh = -ln 2.
    offsets = encode_boxes(torch.tensor([[0.0, 5, 20, 15]]), torch.tensor([[0.0, 0, 10, 20]]))
    torch.testing.assert_close(offsets, torch.tensor([[0.5, 0, math.log(2), -math.log(2)]]))


def test_decoding_undoes_encoding_and_clips() -> None:
    boxes = torch.tensor([[3.0, 4, 30, 20], [-8, 2, 50, 90]])
    references = torch.tensor([[0.0, 0, 16, 16], [10, 10, 20, 40]])
    decoded = decode_boxes(encode_boxes(boxes, references), references, (64, 48))
    torch.testing.assert_close(decoded, torch.tensor([[3.0, 4, 30, 20], [0, 2, 48, 64]]))


def test_decoding_clamps_growth_and_shrinkage() -> None:
    # 1000 / 16 = 62.5 times larger or smaller at most: sides of 625 and 0.16 around (500, 500).
    reference = torch.tensor([[495.0, 495, 505, 505]])
    grown, shrunk = decode_boxes(
        torch.tensor([[0, 0, 99.0, 99], [0, 0, -99, -99]]), reference.repeat(2, 1), (9999, 9999)
    )
    assert (grown[2] - grown[0]).item() == pytest.approx(625, rel=1e-5)
    assert (shrunk[2] - shrunk[0]).item() == pytest.approx(0.16, rel=1e-3)
