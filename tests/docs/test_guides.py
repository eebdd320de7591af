"""The guides' Python runs as it stands, on tiny models in place of the large ones."""

import copy
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
import yaml

import arcflow
from arcflow import cli, config, student
from arcflow.sampling.generate import PARTS, Samples
from arcflow.student import adapter
from arcflow.system import hub
from tests.support.pipelines import perturb, save_style

GUIDES = Path(__file__).parents[2] / "docs"


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (GUIDES / name).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def small_world(flux, tmp_path, monkeypatch):
    """Names that the guides use lead to tiny models and to files here."""
    net = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2)
    perturb(net)
    adapter.save_adapter(net, tmp_path / "hub" / "arcflow-flux-2steps", layout="published")
    save_style(flux, tmp_path / "path/to/style", ["to_q", "ff.net.2"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda repository, patterns: tmp_path / "hub")
    monkeypatch.setattr(type(flux), "from_pretrained", lambda *names, **more: flux)
    monkeypatch.setattr(type(flux.transformer), "from_pretrained", lambda *names, **more: flux.transformer)
    monkeypatch.setattr(type(flux), "to", lambda pipe, device: pipe)
    flux.transformer.register_to_config(sample_size=8)
    flux.default_sample_size = 8


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("quantized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_blocks_of_sampling_run_one_after_the_other(small_world, quantized):
    if quantized:
        pytest.importorskip("torchao")
    names: dict = {}
    torch.manual_seed(0)
    for block in blocks("sampling.md"):
        if "out/lora" in block or "out/merged" in block:  # without this package: tests/reports/test_exports.py
            continue
        if "dist." not in block and (quantized or "torchao" not in block):  # several processes: test_parallel.py
            exec(compile(block, "sampling.md", "exec"), names)
    assert names["image"].size == (16, 16)


@pytest.mark.parametrize("quantized", [False, True])
def test_every_way_to_fit_a_card_leaves_a_pipeline_that_draws(small_world, quantized, flux, monkeypatch):
    """Without a card: `cuda` reads `cpu`, and model offload, which insists on one, is taken as called."""
    if quantized:
        pytest.importorskip("bitsandbytes")
    offloaded: list = []
    for name in ("vae", "text_encoder", "text_encoder_2"):  # group offload leaves its hooks on them
        setattr(flux, name, copy.deepcopy(getattr(flux, name)))
    monkeypatch.setattr(type(flux), "enable_model_cpu_offload", lambda pipe: offloaded.append(pipe))
    names: dict = {}
    for block in [block for block in blocks("memory.md") if quantized or "quant" not in block]:
        exec(compile(block.replace('"cuda"', '"cpu"').replace(", use_stream=True", ""), "memory.md", "exec"), names)
        if "attach" in block:
            assert names["pipe"]("a red cube", num_inference_steps=2).images[0].size == (16, 16)
            arcflow.detach(names["pipe"])
    assert len(offloaded) == 1 + quantized


def trained(command: str) -> config.Run:
    """The run that a line with `torchrun` in it asks for."""
    words = command.split("arcflow.cli")[1].split()
    asked = tyro.cli(cli.Command, args=words, config=(tyro.conf.OmitSubcommandPrefixes,))  # type: ignore[arg-type]
    assert isinstance(asked, cli.Train)
    return asked.recipe


def test_the_slurm_script_is_bash_and_stops_before_its_time():
    (script,) = blocks("training.md", "bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    hours, minutes, _ = map(int, re.findall(r"--time=(\d+):(\d+):(\d+)", script)[0])
    run = trained(script)
    assert run.stop_after is not None and run.stop_after <= 60 * hours + minutes - 10 and run.shard == 8


def test_the_pods_of_the_kubernetes_job_find_the_first_of_them():
    (text,) = blocks("training.md", "yaml")
    service, job = yaml.safe_load_all(text)
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    options = dict(word.removeprefix("--").split("=") for word in container["command"][1:])
    assert options["rdzv-endpoint"].partition(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert int(options["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (patience,) = (int(one["value"]) for one in container["env"])
    assert pod["terminationGracePeriodSeconds"] > patience
    assert trained(" ".join(container["args"])).data.prompts.startswith(container["volumeMounts"][0]["mountPath"])


def test_the_blocks_of_metrics_run_on_what_a_comparison_returns(tmp_path, monkeypatch, capsys):
    """Four prompts, two seeds of each; one process is enough for all_reduce."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def samples() -> Samples:
        images = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
        return Samples(images, torch.from_numpy(rng.normal(size=(8, 16, 32))).float(), 2, dict.fromkeys(PARTS, 0.0))

    rows = {row: samples() for row in ("teacher_50", "arcflow_2")}
    names = {"samples": rows, "seeds": 2, "batches": [sample.images for sample in rows.values()]}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for block in blocks("metrics.md"):
            exec(compile(block, "metrics.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()
    assert names["moments"].count == 16
    assert "of the teacher's diversity" in capsys.readouterr().out
