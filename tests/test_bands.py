"""Five deep bands from training to scoring: the same stretch and the same order of the bands, or a refusal."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from astropy.io import fits
from astropy.table import Table
from pictures import wcs, write_zip

import anomalymatch as am
from anomalymatch.errors import DataError

BANDS = ["u", "g", "r", "i", "z"]
PROBE = ("algorithm=probe", "stretch.combine={hot:{u:1},cool:{r:0.5,i:0.5},red:{z:1}}")
FIXMATCH = ("trainer.iterations=2", "algorithm.learner.batch.labelled=2")


@pytest.fixture
def archive(tmp_path):
    """Sixty images of a float survey: sky noise and a source; every sixth is bright in `u` alone."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-16:16, -16:16]
    images = rng.normal(0, 1, (60, 32, 32, 5)).astype(np.float32)
    for i, image in enumerate(images):
        source = 50 * np.exp(-(x**2 + y**2) / rng.uniform(10, 40))
        image += source[..., None] * ([20, 1, 1, 1, 1] if i % 6 == 0 else [1, 2, 3, 4, 5])
    images[3, :4, :4] = np.nan
    np.savez(tmp_path / "survey.npz", images=images, labels=np.array([i % 6 == 0 for i in range(60)]).astype(int))
    return tmp_path / "survey.npz"


@pytest.fixture
def job(tiny_model):
    """Overrides of a run of one cycle."""
    return [*tiny_model, "al.initial.anomalies=3", "al.initial.normals=10", "al.cycles=1"]


@pytest.mark.slow
@pytest.mark.parametrize("own", [PROBE, FIXMATCH], ids=["probe of three mixed bands", "fixmatch of five bands"])
def test_scoring_uses_the_bands_and_the_stretch_of_the_training(archive, job, tmp_path, own, without_pictures):
    bands = f"dataset.source.bands=[{','.join(BANDS)}]"
    images = ["dataset=numpy", f"data.root={archive}", bands, "dataset.anomaly=1", "stretch=asinh"]
    am.run(*job, *images, *own, folder=tmp_path / "run")
    ranking = am.Ranking.read(tmp_path / "run" / "cycles" / "01" / "scores.parquet")
    shared = [f"run={tmp_path / 'run'}", "dataset=numpy", f"data.root={archive}", "scoring.backend=torch"]
    folder = am.score(*shared, bands, f"output={tmp_path / 'scored'}")
    table = pq.read_table(folder / "scores")
    again = dict(zip(table["id"].to_pylist(), table["logit"].to_pylist(), strict=True))
    # The probe ranks by features in half precision.
    np.testing.assert_allclose([again[id_] for id_ in ranking.ids], ranking.logits, atol=2e-2)
    with pytest.raises(DataError, match="bands z, i, r, g, u"):
        am.score(*shared, "dataset.source.bands=[z,i,r,g,u]", f"output={tmp_path / 'permuted'}")
    with pytest.raises(DataError, match="band0, band1, band2, band3, band4"):
        am.score(*shared, f"output={tmp_path / 'unnamed'}")


@pytest.mark.slow
def test_tiff_files_of_five_bands_are_scored_in_any_archive_and_order(archive, job, tmp_path, without_pictures):
    with np.load(archive) as survey:
        bands, labels = survey["images"], survey["labels"]
    files = {}
    for n, (pixels, label) in enumerate(zip(bands, labels, strict=True)):
        for kind, order in (("folder", slice(None)), ("zip", slice(None, None, -1))):
            items = "".join(f'<Item sample="{k}" role="description">{b}</Item>' for k, b in enumerate(BANDS[order]))
            tag = (42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)
            file = tmp_path / kind / str(label) / f"{n:02d}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            form = {"photometric": "minisblack", "planarconfig": "contig"}
            tifffile.imwrite(file, np.ascontiguousarray(pixels[..., order]), extratags=[tag], **form)
            files[f"{label}/{n:02d}.tif"] = file.read_bytes()
    write_zip(tmp_path / "b.zip", files)
    images = ["dataset=folder", f"data.root={tmp_path / 'folder'}", "dataset.anomaly=1", "stretch=asinh"]
    am.run(*job, *images, *PROBE, folder=tmp_path / "run")
    shared = [f"run={tmp_path / 'run'}", "scoring.backend=torch"]
    scores = []
    for place, more in (("folder", []), ("b.zip", ["dataset=zip", f"dataset.source.bands=[{','.join(BANDS)}]"])):
        folder = am.score(*shared, f"data={tmp_path / place}", *more, f"output={tmp_path / 'scores' / place}")
        table = pq.read_table(folder / "scores")
        scores.append(dict(zip(table["id"].to_pylist(), table["logit"].to_pylist(), strict=True)))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(scores[0]) == 60
    with pytest.raises(DataError, match="bands z, i, r, g, u"):
        am.score(*shared, f"data={tmp_path / 'b.zip'}", f"output={tmp_path / 'permuted'}")


@pytest.mark.slow
def test_finds_with_coordinates_go_to_a_votable(job, tmp_path, without_pictures):
    sky = wcs(150, 2, arcsec=0.36, shape=(200, 200))
    pixels = np.random.default_rng(1).normal(size=(200, 200)).astype(np.float32)
    fits.writeto(tmp_path / "tile.fits", pixels, sky.to_header())
    rows = ["id,ra,dec,tile,label"]
    for i in range(40):
        ra, dec = sky.pixel_to_world_values(20 + 4 * i, 100)
        rows.append(f"s{i},{ra},{dec},tile.fits,{'odd' if i % 8 == 0 else 'plain'}")
    (tmp_path / "catalogue.csv").write_text("\n".join(rows))
    catalogue = [
        "dataset=catalogue",
        f"data.root={tmp_path / 'catalogue.csv'}",
        "dataset.source.size=32",
        "dataset.source.label_column=label",
        "dataset.anomaly=odd",
    ]
    am.run(*job, "algorithm=probe", "stretch=zscale", *catalogue, folder=tmp_path / "run")
    folder = am.score(f"run={tmp_path / 'run'}", *catalogue, f"output={tmp_path / 'out'}", "scoring.backend=torch")
    table = Table.read(folder / "top.vot")
    assert table.colnames == ["id", "ra", "dec", "score", "logit"]
    assert len(table) == 40
    row = table[list(table["id"]).index("s3")]
    np.testing.assert_allclose((row["ra"], row["dec"]), sky.pixel_to_world_values(32, 100), atol=1e-6)
    assert (np.diff(table["logit"]) <= 0).all()
