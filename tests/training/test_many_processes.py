"""A run on several processes: each holds a part of the network, and together they do what one does alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arcflow.distillation.objective import distill
from arcflow.families import network
from arcflow.families.conditioning import rows
from arcflow.runs.checkpoint import broken
from arcflow.student.adapter import load_adapter
from arcflow.system import files, processes
from arcflow.training.learner import build_student, views
from arcflow.training.loop import train
from tests.support.pipelines import save_style, torchrun
from tests.support.trainings import config, quiet, tiny_pipe

PROMPTS = ["a red circle", "two blue squares", "a green star above a circle", "a square"]


def run_of(folder, shard=None):
    """The teacher's path, the optimizer's own directions, then the student's path: all that a run can do, in short."""
    changes = {"model__dropout": 0.0, "keep": 10, "eval_every": 6, "pictures": 0, "shard": shard}
    distillation = {"distill__hold": 6, "distill__decay": 3, "distill__guidance": (2.0, 5.0)}
    return config(folder, **changes, **distillation, optim__directions="segment")


def gradients(folder, shard):
    """Of one batch, on all processes there are."""
    run, device = config("unused", model__dropout=0.0, model__gradient_checkpointing=True), torch.device("cpu")
    with processes.start(device, shard) as ranks:
        pipe, mine = tiny_pipe(), ranks.rows(len(PROMPTS))
        x = network.noise(pipe, list(range(len(PROMPTS))), 8, 8)[mine]
        cond = rows(network.encode_prompts(pipe, PROMPTS, height=8, width=8), mine)
        parameters = build_student(pipe.transformer, run, ranks)
        walker, teacher = views(pipe.transformer, None, 1.0)
        draws = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))][mine]
        for part in distill(walker, teacher, x, cond, config=run.distill, ratio=0.5, generator=draws):
            part.loss.backward()
        ranks.average(parameters.values())
        whole = {name: processes.whole(p.grad).contiguous() for name, p in parameters.items() if p.grad is not None}
        held = {name: processes.local(p.detach()).numel() for name, p in pipe.transformer.named_parameters()}
        whole["held"] = torch.tensor(sum(held.values()))
        if ranks.first:
            save_file(whole, folder / f"{ranks.count}-{shard}.safetensors")
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2, 1], ids=["one copy (FSDP)", "a copy each"])
def test_two_processes_have_the_gradient_of_one(tmp_path, shard):
    torchrun(2, __file__, "gradients", tmp_path, shard)
    alone, together = gradients(tmp_path, None), load_file(tmp_path / f"2-{shard}.safetensors")
    held = together.pop("held") / alone.pop("held")
    assert held == pytest.approx(1 / shard, rel=0.02), "each holds its part of the frozen base too"
    assert alone.keys() == together.keys()
    apart = {name: together[name] - gradient for name, gradient in alone.items()}
    assert length(apart) <= 1e-6 * length(alone)
    for name, gradient in alone.items():
        assert apart[name].norm() <= 1e-5 * gradient.norm(), name


def length(gradient):
    return torch.stack([value.norm() for value in gradient.values()]).norm()


@pytest.mark.long
@pytest.mark.parametrize("shard", [2, 1], ids=["one copy (FSDP)", "a copy each"])
def test_a_run_is_taken_up_by_another_number_of_processes(tmp_path, shard):
    alone = curve(train(run_of(tmp_path / "1"), tiny_pipe(), quiet))
    torchrun(2, __file__, "train", tmp_path / "2", shard)
    assert curve(tmp_path / "2") == pytest.approx(alone, rel=1e-5)
    for count in (1, 4):
        folder = shutil.copytree(tmp_path / "2", tmp_path / f"2-{count}")
        for later in ("00000009", "00000012"):
            shutil.rmtree(folder / "checkpoints" / later)
        torchrun(count, __file__, "train", folder, min(shard, count))
        assert curve(folder) == pytest.approx(alone, rel=1e-5)
    adapters = [load_file(tmp_path / run / "adapter" / "adapter.safetensors") for run in ("1", "2", "2-4")]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapters[2][name], value, rtol=1e-4, atol=1e-5)
    load_adapter(tiny_pipe().transformer, tmp_path / "2-4" / "adapter")


@pytest.mark.slow
def test_a_signal_to_torchrun_lets_all_processes_save(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [*launch, __file__, "long", str(tmp_path / "run")]
    run = subprocess.Popen(command, env={**os.environ, **here}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "00000002").exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[0].decode()
    stopped = int(re.findall(r"stopped at iteration (\d+) of 1000, saved", said)[0])
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert broken(newest) is None and int(newest.name) == stopped


BASES = {
    "bfloat16": {"model__dtype": "bfloat16"},
    "with a LoRA": {"model__teacher_lora": "style"},
    "every weight": {"model__targets": "full"},
}


def on_all_bases(folder):
    """Trainings on a base that is not plain, in the folder where it lies, one after the other in the same processes."""
    # Adam's first steps are as long as the rate, whatever the gradient: where that is rounding, they go either way.
    plain = {"model__base": "base", "model__dropout": 0.0, "optim__iterations": 3, "optim__lr": 1e-4, "pictures": 0}
    for name, changes in BASES.items():
        run = config(folder / name, **plain, **changes)
        train(run, log=quiet)


@pytest.mark.slow
def test_a_base_that_is_not_plain_is_shared_out_too(tmp_path, monkeypatch):
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "base")
    save_style(pipe, tmp_path / "style", ["to_q", "ff.net.2"])
    monkeypatch.chdir(tmp_path)
    torchrun(2, __file__, "bases", tmp_path / "2", folder=tmp_path)
    on_all_bases(tmp_path / "1")
    for name in BASES:
        rounding = 1e-3 if name == "bfloat16" else 1e-5  # its products differ with the size of the batch
        assert curve(tmp_path / "2" / name) == pytest.approx(curve(tmp_path / "1" / name), rel=rounding)


def curve(folder):
    return [value for line in files.read_lines(folder / "log.jsonl") for value in line.values() if value is not None]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 6 does not divide among 4 processes: .* change optim.batch"):
        processes.Ranks(count=4).rows(6)


def test_copies_that_do_not_come_out_even_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with (
        pytest.raises(ValueError, match="6 processes do not make whole copies of 4"),
        processes.start(torch.device("cpu"), 4),
    ):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "gradients":
        gradients(folder, int(sys.argv[3]))
    elif task == "long":
        train(config(folder, optim__iterations=1000, pictures=0, save_every=2), tiny_pipe(), print)
    elif task == "bases":
        on_all_bases(folder)
    else:
        train(run_of(folder, int(sys.argv[3])), tiny_pipe(), quiet)
