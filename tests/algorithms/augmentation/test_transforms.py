import numpy as np
import pytest

from anomalymatch.algorithms.augmentation.transforms import Blur, Gain, Noise, Reorient, Translate, Warp, sky_level
from anomalymatch.algorithms.augmentation.view import View


def galaxy(size=65, bands=3, sky=20, x=0.0, y=0.0, sigma=5.0):
    """Make a Gaussian on a level sky, at (x, y) from the centre."""
    at = np.arange(size) - (size - 1) / 2
    light = np.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / (2 * sigma**2))
    return np.rint(sky + 150 * light[..., None] * np.ones(bands)).astype(np.uint8)


def views(step, image, count=60):
    view = View([step])
    return [view(image, seed) for seed in range(count)]


def moments(image, sky=20.0):
    """Return flux, centre and radius of the light above the sky in the first band."""
    light = np.clip(image[..., 0] - sky - 1.0, 0, None)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] - (np.array(image.shape[:2])[:, None, None] - 1) / 2
    flux = light.sum()
    at = ((light * x).sum() / flux, (light * y).sum() / flux)
    return flux, at, np.sqrt((light * ((x - at[0]) ** 2 + (y - at[1]) ** 2)).sum() / flux / 2)


def test_reorient_gives_each_of_the_eight_orientations():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 2), dtype=np.uint8)
    expected = [np.rot90(flip, turns).tobytes() for flip in (image, image[:, ::-1]) for turns in range(4)]
    drawn = [view.tobytes() for view in views(Reorient(), image, 400)]
    assert set(drawn) == set(expected)
    assert min(drawn.count(each) for each in expected) > 25  # 50 are expected
    wide = image[:5]
    assert {view.shape for view in views(Reorient(), wide)} == {wide.shape}
    assert len({view.tobytes() for view in views(Reorient(), wide)}) == 4


def test_warp_turns_an_object_around_the_centre_by_any_angle():
    found = [moments(view)[1] for view in views(Warp(180.0, (1.0, 1.0), 0.0, "sky"), galaxy(x=15.0), 200)]
    radii, angles = np.hypot(*np.transpose(found)), np.degrees(np.arctan2(*np.transpose(found)))
    np.testing.assert_allclose(radii, 15.0, atol=0.3)
    assert np.histogram(angles, 6, (-180, 180))[0].min() > 15  # a third of 200 / 6 is 11
    small = [moments(view)[1] for view in views(Warp(10.0, (1.0, 1.0), 0.0, "sky"), galaxy(x=15.0), 60)]
    assert np.abs(np.degrees(np.arctan2(np.transpose(small)[1], np.transpose(small)[0]))).max() < 11


def test_warp_magnifies_within_its_range_and_shifts_up_to_its_share():
    sizes = [moments(view)[2] for view in views(Warp(0.0, (0.6, 1.2), 0.0, "sky"), galaxy(), 200)]
    own = moments(galaxy())[2]
    assert 0.58 < min(sizes) / own < 0.66
    assert 1.12 < max(sizes) / own < 1.22
    assert 0.8 < np.exp(np.mean(np.log(sizes))) / own < 0.9  # sqrt(0.6 x 1.2) is 0.85
    at = np.array([moments(view)[1] for view in views(Warp(0.0, (1.0, 1.0), 0.2, "sky"), galaxy(), 200)])
    assert 11.5 < np.abs(at).max() < 13.3  # of 65 pixels


@pytest.mark.parametrize(
    "step", [Warp(180.0, (0.5, 0.5), 0.1, "sky"), Translate(0.4, 0.4, "sky")], ids=["warp", "shift"]
)
def test_the_sky_fills_what_is_uncovered_band_by_band(step):
    image = galaxy(bands=5) + np.arange(0, 50, 10, dtype=np.uint8)
    assert sky_level(image).tolist() == [20, 30, 40, 50, 60]
    for view in views(step, image, 10):
        assert (view.min((0, 1)) >= sky_level(image) - 1).all()
        assert sky_level(view).tolist() == sky_level(image).tolist()
    reflected = views(Warp(45.0, (0.5, 0.5), 0.0, "reflect"), galaxy(sigma=3.0), 5)
    assert all((view[..., 0] > 120).sum() > 2 * (galaxy(sigma=3.0)[..., 0] > 120).sum() / 4 for view in reflected)


@pytest.mark.parametrize(
    "step", [Warp(180.0, (0.6, 1.2), 0.1, "sky"), Blur(0.05), Translate(0.3, 0.3, "sky"), Reorient()]
)
def test_geometry_and_blur_treat_each_band_as_if_it_were_alone(step):
    image = np.random.default_rng(1).integers(0, 256, (24, 24, 6), dtype=np.uint8)
    view = View([step])
    for seed in range(5):
        together = view(image, seed)
        for band in range(6):
            np.testing.assert_array_equal(view(image[..., band : band + 1], seed)[..., 0], together[..., band])


def test_blur_keeps_the_flux_and_widens_by_up_to_its_share():
    plain = moments(galaxy(sigma=2.0))
    found = [moments(view) for view in views(Blur(0.05), galaxy(sigma=2.0), 200)]
    fluxes, _, widths = zip(*found, strict=True)
    np.testing.assert_allclose(fluxes, plain[0], rtol=0.1)
    added = np.sqrt(np.clip(np.square(widths) - plain[2] ** 2, 0, None))
    assert 2.5 < max(added) < 3.4  # a twentieth of 65 pixels is 3.25
    assert min(added) < 0.3


def test_noise_is_independent_of_pixel_and_band_and_has_its_deviation():
    flat = np.full((40, 40, 2), 128, np.uint8)
    noises = np.stack([view.astype(float) - 128 for view in views(Noise(0.1), flat, 200)])
    deviations = noises.std((1, 2))
    assert 23 < deviations.max() < 27  # a tenth of white is 25.5
    assert deviations.min() < 1.5
    assert abs(noises.mean()) < 0.1
    assert abs(np.corrcoef(noises[..., 0].ravel(), noises[..., 1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noises[:, 1:].ravel(), noises[:, :-1].ravel())[0, 1]) < 0.02


def test_gain_brightens_as_often_as_it_darkens_and_bands_apart():
    flat = np.full((4, 4, 3), 100, np.uint8)
    common = np.stack([view[0, 0] for view in views(Gain(0.2, 0.0), flat, 400)]).astype(float)
    assert (np.ptp(common, axis=1) == 0).all()
    assert (common.min(), common.max()) == (80, 125)
    assert abs(np.log(common / 100).mean()) < 0.02
    apart = np.stack([view[0, 0] for view in views(Gain(0.0, 0.2), flat, 400)]).astype(float)
    assert np.abs(np.corrcoef(apart.T) - np.eye(3)).max() < 0.2
    assert View([Gain(0.9, 0.0)])(np.full((2, 2, 1), 255, np.uint8), 3).max() <= 255
