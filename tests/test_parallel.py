"""One image on several processes: context parallelism as diffusers does it, the packed head under its stock plan."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import flux_pipeline, perturb, sample, torchrun

import arcflow
from arcflow import adapter, student


def pipeline():
    torch.manual_seed(0)
    return flux_pipeline()


def work(folder: Path) -> None:
    """What each process runs."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 2  # diffusers asks before it makes its mesh of CPU processes
    dist.init_process_group("gloo")
    pipe = pipeline()
    arcflow.attach(pipe, folder / "adapter")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    tokens = []
    pipe.transformer.norm_out.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    latents = sample(pipe)
    assert tokens == [8, 8], "each process has half of the sixteen tokens, in both steps"
    if dist.get_rank() == 0:
        torch.save(latents, folder / "latents.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_draw_the_image_of_one(tmp_path) -> None:
    pipe = pipeline()
    made = student.build(pipeline().transformer, modes=4, rank=2)
    perturb(made)
    adapter.save_adapter(made, tmp_path / "adapter")
    alone = sample(arcflow.attach(pipe, tmp_path / "adapter"))
    torchrun(2, __file__, tmp_path)
    together = torch.load(tmp_path / "latents.pt", weights_only=True)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_student_goes_on_before_the_work_is_split(flux) -> None:
    flux.transformer._parallel_config = object()  # what enable_parallelism leaves
    with pytest.raises(ValueError, match="attach the adapter first, then call enable_parallelism"):
        student.build(flux.transformer)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
