import subprocess
import sys

import pytest
import torch

from anomalymatch.backbones.openvino import has_openvino, in_batches

SIGNAL_AFTER_THE_MODEL = """
import gc, os, signal, threading
import torch
from anomalymatch.backbones.openvino import openvino_forward

class Bright(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))

kept = [openvino_forward(Bright(), channels=3, size=8, batch_size=2, bf16=False)]
images = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
assert (kept[0](images) == 7).all()

def drop():
    kept.clear()
    gc.collect()

other = threading.Thread(target=drop)
other.start()
other.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")
def test_a_signal_is_handled_after_another_thread_dropped_the_model():
    done = subprocess.run([sys.executable, "-c", SIGNAL_AFTER_THE_MODEL], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["handled"]), done.stderr


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_one_compiled_shape_serves_any_number_of_images_even_none(count):
    def forward(images):
        assert images.shape == (4, 3, 8, 8)
        return images.float().mean(dim=(2, 3)).numpy()

    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8)
    assert in_batches(forward, 4)(images).tolist() == [[float(i)] * 3 for i in range(count)]
