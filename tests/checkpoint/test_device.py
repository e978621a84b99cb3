from __future__ import annotations

import pytest
import torch

from checks.checkpoint.device import DeviceError, choose_device

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.parametrize("worker", [0, 1, 7])
def test_auto_gives_each_worker_a_gpu_or_else_the_cpu(worker: int) -> None:
    assert choose_device("auto", worker) == (f"cuda:{worker % GPUS}" if GPUS else "cpu")


def test_cpu_is_the_cpu_even_beside_a_gpu() -> None:
    assert choose_device("cpu", 3) == "cpu"


def test_chosen_device_can_hold_a_tensor() -> None:
    assert torch.ones(2, device=choose_device("auto", 0)).sum().item() == 2


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:x", "cuda:-1", "cpu cpu", "CUDA", "hub"])
def test_name_that_is_no_device_is_refused_with_those_that_are(wanted: str) -> None:
    with pytest.raises(DeviceError, match=r"^--torch-device .*auto"):
        choose_device(wanted, 0)


def test_gpu_that_torch_does_not_see_is_refused_with_the_number_it_sees() -> None:
    with pytest.raises(DeviceError, match=f"sees {GPUS} CUDA devices"):
        choose_device(f"cuda:{GPUS}", 0)


@pytest.mark.skipif(GPUS > 0, reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="sees 0 CUDA devices"):
        choose_device("cuda", 0)


@pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
def test_cuda_spreads_workers_over_the_gpus() -> None:
    assert [choose_device("cuda", worker) for worker in range(GPUS + 1)] == [
        f"cuda:{worker % GPUS}" for worker in range(GPUS + 1)
    ]


@pytest.mark.skipif(torch.xpu.is_available(), reason="this machine has an XPU")
@pytest.mark.parametrize("wanted", ["meta", "xpu", "mps:5"])
def test_device_that_cannot_compute_here_is_refused(wanted: str) -> None:
    """A device that torch knows by name and that holds no numbers would make every case an error much later."""
    with pytest.raises(DeviceError):
        choose_device(wanted, 0)
