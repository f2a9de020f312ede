"""Heat maps: where colours are drawn, their sign, the scale, and sheets with a legend."""

import numpy as np
import pytest

from anomalymatch.evaluation.heat_maps import heat_sheet, legend_strip, overlay, scale_evidence


def spot(place, value=1.0, side=4):
    heat = np.zeros((side, side), np.float32)
    heat.flat[place] = value
    return heat


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_colours_are_where_the_map_is(channels, value):
    image = np.full((40, 80, channels), 100, dtype=np.uint8)
    drawn = overlay(image, spot(0, value), "stretch")
    assert drawn.shape == (40, 80, 3)
    assert (drawn[:5, :10] != 100).any()
    assert (drawn[20:, 40:] == 100).all()
    assert (overlay(image, np.zeros((4, 4), np.float32), "stretch") == 100).all()
    cropped = overlay(image, spot(0, value), "crop")
    assert (cropped[:5, 20:25] != 100).any()
    assert (cropped[:, :20] == 100).all()  # outside of the square at the centre
    padded = overlay(image, spot(4, value), "pad")  # the place is at rows 20 to 40 of 80, of which 20 are border
    assert (padded[:5, :10] != 100).any()
    assert (padded[25:, 40:] == 100).all()


def test_positive_is_warm_and_negative_blue_on_dark_and_bright_images():
    for grey in (0, 128, 255):
        image = np.full((8, 8, 3), grey, np.uint8)
        warm, blue = (overlay(image, np.full((4, 4), value, np.float32), "stretch")[0, 0] for value in (1, -1))
        assert warm[0] > warm[2] + 50
        assert blue[2] > blue[0] + 50
    strip = legend_strip(2, 101).astype(int)
    assert strip[0, 0, 2] > strip[0, 0, 0]
    assert strip[0, -1, 0] > strip[0, -1, 2]
    assert np.ptp(strip[0, 50]) == 0


def test_evidence_keeps_its_sign_and_its_zero():
    evidence = np.zeros((40, 40), np.float32)
    evidence[5, 5], evidence[30, 30] = 100, -50
    scaled = scale_evidence(evidence)
    assert (scaled[5, 5], scaled.max()) == (1, 1)
    assert scaled[30, 30] == scaled.min() == pytest.approx(-0.5, rel=1e-3)
    assert scaled[20, 5] == pytest.approx(0, abs=1e-6)
    assert scale_evidence(np.minimum(evidence, 9 * evidence)).min() == -1  # a corner does not hide what is warm
    mostly_against = np.full((40, 40), -10, np.float32)
    mostly_against[5, 5] = 10
    assert scale_evidence(mostly_against).max() < 0
    np.testing.assert_allclose(scale_evidence(7 * evidence), scaled, atol=1e-6)
    assert not scale_evidence(np.zeros((40, 40), np.float32)).any()
    np.testing.assert_allclose(scale_evidence(np.full((40, 40), 3, np.float32)), 1, rtol=1e-5)


def test_a_sheet_has_images_above_their_heat_and_a_legend():
    images = [np.full((30 + 5 * k, 40, 3), 50, dtype=np.uint8) for k in range(11)]
    heats = [spot(k) for k in range(11)]

    def sheet(count, **options):
        return heat_sheet(images[:count], heats[:count], [f"im{k}" for k in range(count)], "pad", **options)

    one, eight, eleven = (sheet(n) for n in (1, 8, 11))
    assert one.height == eight.height < eleven.height
    upper, lower = np.split(np.asarray(eight)[: 2 * (eight.height // 2)], 2)
    assert np.asarray(lower).std() > np.asarray(upper).std()  # the heat
    with_legend = sheet(1, legend=("against", "for"))
    assert with_legend.height > one.height
    assert with_legend.width >= one.width
    assert (np.asarray(sheet(2, frames=["#FF0000", None]))[..., 0] == 255).any()
