"""A run folder knows its run by content: what may change is told, what may not is refused by name."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict

from arcflow.config import Data, from_json
from arcflow.families import network
from arcflow.families.loading import _with_lora, put_on_device
from arcflow.student.state import learn
from arcflow.system import files
from arcflow.system.processes import OnAll, Ranks
from arcflow.training import home
from arcflow.training.home import claim_run, contents_of, weights_digest
from arcflow.training.learner import build_student, views
from arcflow.training.loop import train
from tests.support.trainings import config, quiet, tiny_pipe


def listed(folder, count=12):
    folder.mkdir(exist_ok=True)
    path = folder / "list.txt"
    path.write_text("".join(f"a red ring {i}\n" for i in range(count)))
    return path


def settings(out, prompts, **changes):
    data = Data(prompts=str(prompts), held_out_count=2, teacher_steps=2, height=8, width=8)
    return config(out, data=data, pictures=0, **{"optim__iterations": 2, **changes})


@pytest.fixture
def begun(tmp_path):
    """A run of two iterations that stands at the first."""
    run = settings(tmp_path / "run", listed(tmp_path / "here"))
    train(dataclasses.replace(run, stop_after=1e-9), tiny_pipe(), quiet)
    return run


@pytest.mark.slow
def test_another_list_under_the_same_name_is_refused_by_name(begun, tmp_path):
    listed(tmp_path / "here", 18)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run with another (held-out )?prompts?: what data"):
        train(begun, tiny_pipe(), quiet)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_the_same_list_in_another_folder_goes_on(begun, tmp_path):
    (tmp_path / "there").mkdir()
    moved = shutil.move(tmp_path / "here" / "list.txt", tmp_path / "there" / "list.txt")
    said = []
    train(settings(tmp_path / "run", moved), tiny_pipe(), said.append)
    assert any("goes on with other settings (data.prompts" in one for one in said)
    assert any("resuming" in one for one in said)
    assert from_json((tmp_path / "run" / "run.json").read_text()).data.prompts == str(moved)


@pytest.mark.slow
def test_another_base_under_the_same_name_is_refused_and_the_same_elsewhere_is_not(begun, tmp_path):
    other = tiny_pipe()
    for p in other.transformer.parameters():
        p.data.mul_(1.5)
    with pytest.raises(ValueError, match="holds a run with another teacher: what model.base and model.teacher_lora"):
        train(begun, other, quiet)
    moved = dataclasses.replace(begun, model=dataclasses.replace(begun.model, base="elsewhere"))
    train(moved, tiny_pipe(), quiet)


@pytest.mark.slow
def test_more_iterations_for_a_finished_run_are_given_and_fewer_than_done_refused(begun, tmp_path):
    said = []
    longer = dataclasses.replace(begun, optim=dataclasses.replace(begun.optim, iterations=4))
    train(begun, tiny_pipe(), quiet)
    train(longer, tiny_pipe(), said.append)
    assert any("goes on with other settings (optim.iterations: 2 there, 4 now)" in one for one in said)
    lines = [line["step"] for line in files.read_lines(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert lines == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="holds a run of 4 iterations, and 2 are asked for"):
        train(begun, tiny_pipe(), quiet)


def test_a_run_folder_of_before_has_no_digests_and_goes_by_names(tmp_path):
    run = settings(tmp_path / "run", listed(tmp_path / "here"))
    files.write_json(tmp_path / "run" / "run.json", json.loads(home.to_json(run)))
    (tmp_path / "run" / "log.jsonl").touch()
    claim_run(run, Ranks(), {"prompts": "a", "held_out": "b", "teacher": "c"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["contents"]["teacher"] == "c"
    with pytest.raises(ValueError, match="another teacher"):
        claim_run(run, Ranks(), {"prompts": "a", "held_out": "b", "teacher": "d"})
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, rank=8))
    with pytest.raises(ValueError, match="model.rank: 4 there, 8 now"):
        claim_run(other, Ranks(), {"prompts": "a"}, write=False)


def test_a_folder_in_which_nothing_has_begun_may_become_another_run(tmp_path):
    run = config(tmp_path, model__base="typo")
    claim_run(run, Ranks())
    claim_run(config(tmp_path), Ranks())
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match="model.base"):
        claim_run(run, Ranks())


def test_weights_are_known_by_what_they_are_wherever_and_however_named():
    def net(scale=1.0):
        made = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        for i, p in enumerate(made.parameters()):
            p.data = torch.arange(p.numel()).reshape(p.shape).float() * scale + i
        return made

    named = torch.nn.ModuleDict({"x": net()})
    assert weights_digest(net()) == weights_digest(named) != weights_digest(net(1.001))
    assert weights_digest(net().bfloat16()) and weights_digest(net().half())


def test_a_file_in_the_way_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be a folder, a file is in the way"):
        train(config(tmp_path / "file"), tiny_pipe(), quiet)


def test_machines_without_a_common_disk_are_noticed_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(home, "SEEN", 0.0)
    monkeypatch.setattr(Ranks, "any", lambda self, *flags: flags)
    monkeypatch.setattr(Ranks, "agree", lambda self, make, group=None: "the first one's token")
    with pytest.raises(OnAll, match="not the same folder for all 2 processes: expected a disk that all machines see"):
        with home.home(str(tmp_path), Ranks(rank=1, count=2)):
            pass


def test_the_teacher_draws_no_random_numbers_though_its_lora_has_a_dropout(tmp_path):
    net = copy.deepcopy(tiny_pipe().transformer)
    layer = "single_transformer_blocks.0.proj_mlp"
    net.add_adapter(LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=[layer]))
    about = _collate_lora_metadata({"transformer": net})
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(net), **about)
    pipe, run = _with_lora(tiny_pipe(), str(tmp_path)), config(tmp_path / "run", model__dropout=0.5)
    put_on_device(pipe, run.model, torch.device("cpu"), Ranks())
    build_student(pipe.transformer, run, Ranks())
    walker, teacher = views(pipe.transformer)
    cond, x = network.encode_prompts(pipe, ["a red ring"], height=8, width=8), network.noise(pipe, [0], 8, 8)
    sigma = torch.tensor([0.7])
    with torch.no_grad():
        pipe.transformer.eval()
        still = teacher(x, sigma, cond)
        learn(pipe.transformer)
        assert all(torch.equal(teacher(x, sigma, cond), still) for _ in range(2))
        dropouts = [
            m for name, m in pipe.transformer.named_modules() if "lora_dropout" in name and not list(m.children())
        ]
        assert dropouts and not any(m.training for m in dropouts)
        for low in pipe.transformer._arcflow.lows.values():
            assert low.dropout.training
            low.up.data.fill_(0.1)
        ends = [walker(x, sigma, cond).v for _ in range(2)]
    assert not torch.equal(*ends), "the student's own dropout is on"


def test_a_folder_named_in_letters_that_the_encoding_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="has letters that the system's encoding lacks.*PYTHONUTF8=1.*another --out"):
        train(config(tmp_path / "exp\udcc3\udca9rience"), tiny_pipe(), quiet)
    assert not list(tmp_path.iterdir())


def test_contents_of_a_list_are_its_rows_and_not_its_place(tmp_path):
    from arcflow.data.batches import open_prompts

    def digests(folder, count=12):
        run = settings("unused", listed(tmp_path / folder, count))
        return contents_of(open_prompts(run.data, seed=0, batch=4))

    assert digests("a") == digests("b") != digests("c", 13)
