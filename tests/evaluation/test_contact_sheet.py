import numpy as np
import pytest

from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS, PAPER, TEXT, contact_sheet
from anomalymatch.types import Label

MARGIN, GAP, TILE = 14, 10, 112


def plain(height, width, channels, value=200):
    return np.full((height, width, channels), value, dtype=np.uint8)


def rgb(colour):
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def pixels(sheet):
    return np.asarray(sheet)


def bright(sheet):
    """Extent of the image in a one-tile sheet: its grey level is 200, lighter than the tile."""
    rows, columns = np.nonzero((pixels(sheet)[: MARGIN + TILE] == 200).all(axis=2))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (106, 106)),
        ((30, 60), (53, 106)),
        ((400, 100), (106, 26)),
        ((1, 1), (106, 106)),
        ((1, 900), (1, 106)),
    ],
)
def test_images_are_fitted_without_distortion(size, expected):
    assert bright(contact_sheet([plain(*size, 3)], ["a"])) == expected


def test_layout_of_rows_and_columns():
    sheet = contact_sheet([plain(8, 8, 3)] * 5, ["a"] * 5, columns=3, tile=50)
    width = 2 * MARGIN + 3 * 50 + 2 * GAP
    assert sheet.width == width
    one_row = contact_sheet([plain(8, 8, 3)], ["a"], columns=3, tile=50)
    assert one_row.width == 2 * MARGIN + 50
    assert sheet.height == 2 * one_row.height - 2 * MARGIN + GAP


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (plain(9, 9, 1, 90), (90, 90, 90)),
        (np.dstack([plain(9, 9, 1, 10), plain(9, 9, 1, 50)]), (10, 30, 50)),
        (np.dstack([plain(9, 9, 1, value) for value in (10, 20, 30)]), (10, 20, 30)),
        (np.dstack([plain(9, 9, 1, value) for value in (10, 20, 30, 0, 99)]), (10, 20, 30)),
    ],
)
def test_any_number_of_channels(image, colour):
    middle = MARGIN + TILE // 2
    assert contact_sheet([image], ["a"]).getpixel((middle, middle)) == colour


def test_frames():
    frames = [FRAME_COLOURS[Label.ANOMALY], None]
    sheet = contact_sheet([plain(9, 9, 3)] * 2, ["a", "b"], frames=frames)
    assert sheet.getpixel((MARGIN + 1, MARGIN + 1)) == rgb(frames[0])
    assert sheet.getpixel((MARGIN + TILE + GAP + 1, MARGIN + 1)) not in (rgb(frames[0]), rgb(PAPER))
    assert set(FRAME_COLOURS) == set(Label)
    assert len(set(FRAME_COLOURS.values())) == len(Label)


def test_captions_are_written_shortened_and_kept_within_the_tile():
    long = "survey/tile_000123/galaxy_with_a_very_long_name_0042.fits"
    sheet = contact_sheet([plain(9, 9, 3, 0)], [f"{long}\n0.987"], tile=112)
    below = pixels(sheet)[MARGIN + TILE + 2 :]
    written = (below != rgb(PAPER)).any(axis=2)
    assert (below == rgb(TEXT)).all(axis=2).any()
    columns = np.nonzero(written.any(axis=0))[0]
    assert columns.min() >= MARGIN - 1
    assert columns.max() <= MARGIN + TILE
    # The end of a long id tells images apart.
    other = contact_sheet([plain(9, 9, 3, 0)], [f"{long.replace('0042', '0043')}\n0.987"], tile=112)
    assert (pixels(other) != pixels(sheet)).any()


def test_odd_captions_do_no_harm():
    odd = contact_sheet([plain(9, 9, 3)] * 4, ["", "\x00\x1b[31m", "银河 🌌", "x" * 5000], tile=16)
    assert odd.size == contact_sheet([plain(9, 9, 3)] * 4, ["a"] * 4, tile=16).size


def test_no_images():
    sheet = contact_sheet([], [])
    assert sheet.width == TILE + 2 * MARGIN
    assert (pixels(sheet) == rgb(TEXT)).all(axis=2).any()


def test_refusals():
    with pytest.raises(ValueError, match="expected 1 captions and frames, got 0 and 0"):
        contact_sheet([plain(2, 2, 3)], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        contact_sheet([plain(2, 2, 3)], ["a"], frames=[None, None])
    with pytest.raises(ValueError, match="columns >= 1 and tile >= 16"):
        contact_sheet([], [], columns=0)
