import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import anomalymatch

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_resolves():
    assert dir(anomalymatch) == sorted(anomalymatch.__all__)
    assert all(getattr(anomalymatch, name) is not None for name in anomalymatch.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = anomalymatch.nonsense


def test_importing_the_package_takes_no_heavy_library_along():
    code = "import sys, anomalymatch; print([m for m in ('torch', 'timm', 'hydra', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.slow
def test_the_wheel_carries_configuration_and_template(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    wanted = ["conf/config.yaml", "conf/experiment/demo_quick.yaml", "evaluation/report.html.j2"]
    assert {f"anomalymatch/{name}" for name in wanted} <= set(inside)
