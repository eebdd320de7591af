"""Students in coefficients: the base with a LoRA over a whole step, and bends beside it."""

import copy
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import arcflow
from arcflow import student
from arcflow.config import Model
from arcflow.distillation.policy import Policy
from arcflow.families import network
from arcflow.path import step_grid
from arcflow.portable import own_length
from arcflow.series import Series, legendre_means
from arcflow.student import adapter, formats
from arcflow.student.coefficients import CoefficientHead
from arcflow.student.places import trainable_shapes
from arcflow.student.state import is_student, state_of, trainable
from tests.support.pipelines import SIDE, fresh, perturb, sample

FORM = {"form": "coefficients", "modes": 4, "rank": 2}


def built(net, seed=0, move=True, **more):
    """A student in coefficients on this network, whose weights have moved."""
    student.build(net, **{**FORM, **more}, generator=torch.Generator().manual_seed(seed)).eval()
    if move:
        perturb(net, seed=seed)
    return net


def test_a_new_student_is_its_teacher_at_any_number_of_steps(pipe, tmp_path):
    """In the stock pipeline, to the last bit: bends and LoRA start at zero."""
    stock = {steps: sample(pipe, num_inference_steps=steps) for steps in (1, 2, 4)}
    adapter.save_adapter(built(copy.deepcopy(pipe.transformer), move=False), tmp_path)
    arcflow.attach(pipe, tmp_path)
    for steps, wanted in stock.items():
        assert torch.equal(sample(pipe, num_inference_steps=steps), wanted), steps
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), stock[2])


def test_what_a_call_describes_is_a_path_whose_mean_is_the_first_coefficient(net, inputs):
    built(net)
    path = student.predict(net, inputs.x, 1.0, inputs.cond)
    assert isinstance(path, Series) and isinstance(path, Policy)
    own = float(step_grid(2)[0] - step_grid(2)[1])
    torch.testing.assert_close(path.mean_velocity(0.0, own), path.c[..., 0, :])
    assert (path.mean_velocity(0.0, own / 2) - path.c[..., 0, :]).abs().max() > 1e-3
    with torch.no_grad(), student.teacher(net) as base:
        teacher = network.call(base, inputs.x, 1.0, inputs.cond)
    assert not torch.equal(path.c[..., 0, :], teacher)


def test_behind_its_own_step_a_path_goes_on_straight_as_the_integrating_head_does(net, inputs):
    built(net)
    path = student.predict(net, inputs.x, 1.0, inputs.cond)
    own = float(step_grid(2)[0] - step_grid(2)[1])
    step, mean = path.displacement(0.0, own), path.c[..., 0, :]
    torch.testing.assert_close(path.displacement(0.0, own + 0.1) - step, 0.1 * mean)
    torch.testing.assert_close(path.displacement(own + 0.1, own + 0.2), 0.1 * mean)
    assert torch.equal(path.velocity(own + 0.1), mean) and not torch.allclose(path.velocity(own), mean)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_stock_pipeline_walks_the_path(pipe, tmp_path, steps):
    """A step of its own takes the mean, one that is part of it the bends too, one that leaves it goes straight on."""
    adapter.save_adapter(built(copy.deepcopy(pipe.transformer)), tmp_path)
    drawn = sample(arcflow.attach(pipe, tmp_path), num_inference_steps=steps)
    cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE, max_sequence_length=8)
    wanted = network.noise(pipe, [0], SIDE, SIDE)
    with torch.no_grad():
        for here, there in pairwise(step_grid(steps).tolist()):
            path = student.predict(pipe.transformer, wanted, here, cond)
            wanted = wanted - (here - there) * path.mean_velocity(0.0, min(here - there, float(path.length[0])))
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)


def test_at_its_own_steps_the_bends_do_not_count(pipe, tmp_path):
    made = built(copy.deepcopy(pipe.transformer))
    drawn = {}
    for bends in ("as learned", "zero"):
        if bends == "zero":
            with torch.no_grad():
                for name, parameter in student.trainable(made).items():
                    if "_bends." in name:
                        parameter.zero_()
        arcflow.attach(pipe, adapter.save_adapter(made, tmp_path / bends))
        drawn[bends] = {steps: sample(pipe, num_inference_steps=steps) for steps in (2, 4)}
    torch.testing.assert_close(drawn["as learned"][2], drawn["zero"][2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(drawn["as learned"][4], drawn["zero"][4], rtol=1e-3, atol=1e-4)


def test_on_disk_all_but_the_bends_is_lora(net, inputs, tmp_path):
    made = built(copy.deepcopy(net))
    adapter.save_adapter(made, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == trainable_shapes(net, 4, 2, form="coefficients")
    others = sorted(name for name in tensors if ".lora_" not in name)
    assert others == ["proj_out_bends.bias", "proj_out_bends.weight"]
    assert {"norm_out.linear.lora_A.weight", "proj_out.lora_B.weight"} <= tensors.keys()
    info = adapter.read_info(tmp_path)
    assert (info.form, info.modes, info.rank) == ("coefficients", 4, 2)
    loaded = arcflow.load_adapter(net, tmp_path)
    wanted, found = (student.predict(n, inputs.x, 0.9, inputs.cond) for n in (made, loaded))
    assert torch.equal(found.c, wanted.c) and torch.equal(found.length, wanted.length)
    with pytest.raises(ValueError, match="save (with layout=|it as )'arcflow'"):
        adapter.save_adapter(made, tmp_path / "published", layout="published")


@pytest.mark.slow
def test_one_form_takes_the_place_of_the_other(pipe, tmp_path):
    adapter.save_adapter(built(copy.deepcopy(pipe.transformer)), tmp_path / "coefficients")
    mixture = student.build(copy.deepcopy(pipe.transformer), modes=2, rank=2).eval()
    perturb(mixture)
    adapter.save_adapter(mixture, tmp_path / "mixture")
    stock = sample(pipe)
    wanted = {form: sample(arcflow.attach(fresh(pipe), tmp_path / form)) for form in ("coefficients", "mixture")}
    for form in ("coefficients", "mixture", "coefficients"):
        assert torch.equal(sample(arcflow.attach(pipe, tmp_path / form)), wanted[form])
    before = {name for name, _ in arcflow.detach(pipe).transformer.named_modules()}
    assert torch.equal(sample(pipe), stock)
    assert before == {name for name, _ in fresh(pipe).transformer.named_modules()}
    assert not any("student" in name for name in before)


def test_fused_it_is_attached_again_and_saved_as_of_the_same_base(flux, tmp_path):
    """Its LoRA is merged into the last layer, by which a base is known."""
    adapter.save_adapter(built(copy.deepcopy(flux.transformer)), tmp_path / "one")
    arcflow.attach(flux, tmp_path / "one", fuse=True)
    drawn = sample(flux)
    arcflow.save_adapter(flux.transformer, tmp_path / "again")
    for folder in ("one", "again"):
        arcflow.attach(flux, tmp_path / folder, fuse=True)
        assert torch.equal(sample(flux), drawn)
        assert adapter.read_info(tmp_path / folder).fingerprint == adapter.read_info(tmp_path / "one").fingerprint


def test_fused_it_is_the_base_with_other_weights(pipe, tmp_path):
    adapter.save_adapter(built(copy.deepcopy(pipe.transformer)), tmp_path)
    stock = sample(pipe)
    apart = sample(arcflow.attach(pipe, tmp_path))
    torch.testing.assert_close(sample(arcflow.attach(pipe, tmp_path, fuse=True)), apart, rtol=1e-3, atol=1e-4)
    assert torch.equal(sample(arcflow.detach(pipe)), stock)


COMPILED = """
import copy, sys, tempfile, torch
import arcflow
from arcflow import student
from arcflow.student import adapter
from tests.support.pipelines import flux_pipeline, perturb, sample

torch.manual_seed(0)
torch.set_num_threads(1)
pipe = flux_pipeline()
made = student.build(copy.deepcopy(pipe.transformer), form=sys.argv[1], modes=4, rank=2).eval()
perturb(made)
arcflow.attach(pipe, adapter.save_adapter(made, tempfile.mkdtemp()))
wanted = {steps: sample(pipe, num_inference_steps=steps) for steps in (3, 4)}
pipe.transformer.compile(backend="eager", fullgraph=True)
for steps in (4, 3):
    torch.testing.assert_close(sample(pipe, num_inference_steps=steps), wanted[steps])
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["coefficients", "mixture"])
def test_a_whole_network_that_is_compiled_hears_every_step(form):
    """In one graph, at any number of steps. It runs in a process of its own, since checks of shapes do not compile."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    run = subprocess.run([sys.executable, "-c", COMPILED, form], env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_part_of_it_goes_by_a_linears_name(flux):
    """Else a style's training, which looks for names, would take it for one."""
    built(flux.transformer)
    flux.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out", "linear"]), "style")
    assert trainable(flux.transformer)


def test_gradients_reach_all_that_is_trained_and_nothing_else(net, inputs):
    built(net)
    net.train()
    path = student.predict(net, inputs.x, 1.0, inputs.cond)
    (path.mean_velocity(0.05, 0.1).square().mean() + path.mean_velocity(0.0, 0.2).square().mean()).backward()
    trained = student.trainable(net)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    net.zero_grad()
    own = float(path.length[0])
    student.predict(net, inputs.x, 1.0, inputs.cond).mean_velocity(0.0, own).square().mean().backward()
    assert trained["proj_out_bends.weight"].grad.abs().max() < 1e-6  # the end of the step is the mean's alone


def test_its_own_steps_are_those_of_its_record(flux, tmp_path):
    info = formats.AdapterInfo(steps=4, also_steps=(3,), shift=2.0, final_step_scale=0.5)
    grids = tuple(tuple(step_grid(steps, 2.0, 0.5).tolist()) for steps in (4, 3))
    made = built(copy.deepcopy(flux.transformer), grids=grids)
    with pytest.raises(ValueError, match="the student's own steps are at .*, the record's at .*: expected the same"):
        adapter.save_adapter(made, tmp_path)
    assert not list(tmp_path.iterdir())
    adapter.save_adapter(made, tmp_path, info=info)
    arcflow.load_adapter(flux.transformer, tmp_path)
    assert state_of(flux.transformer).grids == grids


def test_a_step_ends_where_the_students_own_does():
    two, three = (tuple(step_grid(steps).tolist()) for steps in (2, 3))
    sigma = torch.tensor([1.0, 0.9, two[1], 0.1])
    torch.testing.assert_close(own_length(sigma, (two,)), torch.tensor([1 - two[1], 0.9 - two[1], two[1], 0.1]))
    both = own_length(torch.tensor([1.0, three[1], two[1]]), (two, three))  # of several, the longest
    torch.testing.assert_close(both, torch.tensor([1 - two[1], three[1] - three[2], two[1]]))


def test_misuse_is_refused_with_a_remedy(unchecked, flux, tmp_path):
    with pytest.raises(ValueError, match="modes is 9; a path in coefficients has 1 to 8"):
        built(flux.transformer, modes=9)
    with pytest.raises(ValueError, match="its base with a LoRA; expected one"):
        built(flux.transformer, lora=False)
    assert not is_student(flux.transformer)
    for wrong in ({"modes": 16}, {"modes": 4, "lora": False}, {"modes": 4, "targets": "full"}):
        with pytest.raises(ValueError, match="model.(modes|lora|targets) = .*coefficients"):
            Model(form="coefficients", **wrong)
    told = adapter.save_adapter(built(copy.deepcopy(flux.transformer)), tmp_path) / "arcflow.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "form": "mixture", "sha256": {}}))
    with pytest.raises(ValueError, match="missing: .*proj_out_means"):
        arcflow.attach(flux, tmp_path)


def test_the_head_is_exact_in_float32_at_every_share():
    head = CoefficientHead(6, 4, 8, (tuple(step_grid(2).tolist()),))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    features, straight = torch.randn(2, 3, 6), torch.randn(2, 3, 8)
    length = 1 - head.grids[0][1]
    path = Series(head(features, straight).unflatten(-1, (4, 8)), torch.full((2,), length), legendre_means)
    for share in (0.01, 0.3, 0.99, 1.0):
        found = head.mean_velocity(features, straight, torch.tensor(share * length), torch.tensor(1.0))
        torch.testing.assert_close(found, path.mean_velocity(0.0, share * length), rtol=1e-4, atol=1e-5)
