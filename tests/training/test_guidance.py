"""A range of guidance in one student: what each sample is told, who hears it, and that a run is repeatable."""

import pytest
import torch
from safetensors.torch import load_file

from arcflow.config import ALWAYS, Data
from arcflow.families import family_named
from arcflow.families.guidance import clamp_guidance, usual, with_drawn_guidance
from arcflow.student import views
from arcflow.student.adapter import read_info
from arcflow.system.seeds import seed_of
from arcflow.training.loop import train
from tests.support.trainings import config, quiet, tiny_pipe

RANGE = (1.5, 5.0)

SHORT = {
    "data": Data(count=16, held_out_count=2, teacher_steps=2, height=8, width=8),
    "optim__iterations": 4,
    "optim__micro_batch": 2,
    "distill__hold": ALWAYS,
    "distill__reuse": 2,
    "eval_every": 4,
    "save_every": 4,
    "pictures": 0,
}


def all_told(seeds, among=RANGE) -> list[float]:
    return with_drawn_guidance({"guidance": torch.zeros(len(seeds))}, among, seeds)["guidance"].tolist()


OWN = all_told([seed_of(0, "guidance", i) for i in range(8)])
"""Of the samples in the two batches for which such a run asks its teacher."""


def short(folder, pipe, guidance=RANGE, **more):
    return train(config(folder, **SHORT, distill__guidance=guidance, **more), pipe, quiet)


def kept(folder):
    """All numbers of a run: its checkpoint, its log, its adapter."""
    newest = max((folder / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), folder / "adapter" / "adapter.safetensors"]
    tensors = {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}
    return tensors, (folder / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over a range, and what its network was told: the view, whether it learned, the samples' guidance."""
    pipe, heard, folder = tiny_pipe(), [], tmp_path_factory.mktemp("range")

    def listen(net, inputs, words):
        view = "student" if not views.in_teacher_view(net) else "teacher"
        heard.append((view, torch.is_grad_enabled(), set(words["guidance"].tolist())))

    hook = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        short(folder, pipe)
    finally:
        hook.remove()
    return folder, heard


def test_each_sample_is_told_a_number_of_its_own_by_its_seed_alone():
    seeds = [seed_of(0, "guidance", i) for i in range(300)]
    whole = all_told(seeds)
    assert all_told(seeds[:7]) + all_told(seeds[7:]) == whole and len(set(whole)) == 300
    assert RANGE[0] <= min(whole) < 1.6 and 4.9 < max(whole) <= RANGE[1]
    assert sum(whole) / 300 == pytest.approx(sum(RANGE) / 2, abs=0.2)
    cond = {"guidance": torch.zeros(2)}
    assert with_drawn_guidance(cond, None, seeds) is cond


@pytest.mark.slow
def test_teacher_and_student_are_told_the_same(run):
    """In every micro-batch the teacher hears the numbers of the student's call before it, and they are the samples'."""
    learned, own = set(), set()
    for view, learns, numbers in run[1]:
        if view == "student" and learns:
            own = numbers
            learned |= own
        elif own and view == "teacher" and not numbers & held_out():
            assert numbers == own
    assert learned == set(OWN)


def held_out() -> set[float]:
    return set(all_told([seed_of(0, "held-out guidance", i) for i in range(2)]))


@pytest.mark.slow
def test_walks_are_kept_with_what_their_samples_were_told(run):
    walks, _ = kept(run[0])
    found = {name: value.tolist() for name, value in walks.items() if name.endswith("cond.guidance")}
    assert sorted(sum(found.values(), [])) == sorted(OWN) and len(found) == 4


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bits(run, tmp_path):
    short(tmp_path, tiny_pipe(), stop_after=1e-9)
    short(tmp_path, tiny_pipe())
    assert_same(kept(run[0]), kept(tmp_path))


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1] == other[1]


@pytest.mark.slow
def test_a_range_of_no_width_is_the_number_to_the_bit(tmp_path):
    short(tmp_path / "number", tiny_pipe(), 3.3)
    short(tmp_path / "range", tiny_pipe(), (3.3, 3.3))
    assert_same(kept(tmp_path / "number"), kept(tmp_path / "range"))
    one, other = (read_info(tmp_path / name / "adapter") for name in ("number", "range"))
    assert (one.guidance, one.guidance_range) == (other.guidance, other.guidance_range) == (3.3, None)


@pytest.mark.slow
def test_the_adapter_says_its_range_and_what_to_draw_with(run):
    info = read_info(run[0] / "adapter")
    assert (info.guidance, info.guidance_range) == (3.5, RANGE)
    assert usual((4.0, 5.0), family_named("flux")) == 4.0 and usual(2.0, family_named("flux")) == 2.0
    assert [clamp_guidance(given, RANGE) for given in (0.0, 2.0, 9.0)] == [1.5, 2.0, 5.0]


def test_a_base_that_embeds_no_guidance_is_refused_a_range_before_anything_is_written(tmp_path):
    pipe = tiny_pipe()
    pipe.transformer.register_to_config(guidance_embeds=False)
    with pytest.raises(ValueError, match=r"guidance = \(1.5, 5.0\): expected one number .* distill.teacher_cfg"):
        short(tmp_path / "run", pipe)
    assert not (tmp_path / "run" / "run.json").exists()
