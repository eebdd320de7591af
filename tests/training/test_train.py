"""The loop on a tiny pipeline: what it learns, leaves behind, survives and says."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from arcflow import attach, student
from arcflow.config import Data, Optim, from_json
from arcflow.data import cache
from arcflow.data.batches import open_prompts
from arcflow.distillation.walk import arcs
from arcflow.families import network
from arcflow.path import step_grid
from arcflow.reports import model_card
from arcflow.runs.checkpoint import Progress
from arcflow.runs.log import HELD_OUT
from arcflow.student.adapter import read_info
from arcflow.system import files, signals
from arcflow.system.devices import attention, torch_device
from arcflow.system.processes import Ranks
from arcflow.system.signals import Stopped, stop_signals
from arcflow.training.home import claim_run
from arcflow.training.loop import train
from arcflow.training.optimizer import accepted, adamw, rate
from tests.support.prompt_lists import with_images
from tests.support.trainings import ITERATIONS, config, newest_tensors, quiet, tiny_pipe


def finished(folder):
    """Everything a run leaves that must not depend on interruptions."""
    return newest_tensors(Path(folder)), (Path(folder) / "log.jsonl").read_bytes()


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert one[1].splitlines() == other[1].splitlines()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run, its pipeline and what it said."""
    messages, pipe = [], tiny_pipe()
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    folder = train(config(tmp_path_factory.mktemp("run")), pipe, messages.append)
    return folder, pipe, messages, before


def test_a_run_leaves_a_folder_that_explains_itself(run):
    folder, *_ = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter", "checkpoints", "log.jsonl", "run.json", "held_out.safetensors"}
    assert from_json((folder / "run.json").read_text()) == config(folder)
    assert len(list((folder / "checkpoints").iterdir())) == 2
    drawn = [path.name for path in sorted((folder / "pictures").iterdir())]
    assert drawn == ["000000.png", "000004.png", "000008.png", "000012.png"]
    with Image.open(folder / "pictures" / drawn[0]) as image:
        assert image.size == (3 * 8, 2 * 8)  # teacher above student


def test_the_log_has_every_iteration_and_the_distance_where_asked(run):
    lines = files.read_lines(run[0] / "log.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, ITERATIONS + 1))
    assert all(line["loss"] == pytest.approx(line["loss_1"] + line["loss_2"]) for line in losses)
    distances = [line for line in lines if "distance" in line]
    assert [line["step"] for line in distances] == [0, 4, 8, 12]
    assert distances[0]["euler_2"] > distances[0]["euler_4"] > 0


def test_the_distance_falls(run):
    distances = [line["distance"] for line in files.read_lines(run[0] / "log.jsonl") if "distance" in line]
    assert distances[-1] < distances[0]


def test_only_the_trainable_weights_have_changed(run):
    _, pipe, _, before = run
    averaged = {name: p.clone() for name, p in student.trainable(pipe.transformer).items()}
    newest = finished(run[0])[0]
    assert all(torch.equal(averaged[name], newest[f"ema.{name}"]) for name in averaged)
    base = {name.replace(".frozen", ""): p for name, p in pipe.transformer.state_dict().items()}
    assert all(torch.equal(base[name], before[name]) for name in before)


def test_the_adapter_samples_like_the_student_it_was_saved_from(run):
    folder, pipe, *_ = run
    prompts, fresh = ["a red ring"], tiny_pipe()
    attach(fresh, str(folder / "adapter"))
    ends = []
    for p in (pipe, fresh):
        cond = network.encode_prompts(p, prompts, height=8, width=8)
        net = p.transformer.eval()
        x = network.noise(p, [1], 8, 8)
        ends.append(arcs(lambda x, s, c, net=net: student.predict(net, x, s, c), x, cond, step_grid(2)))
    assert torch.allclose(*ends, atol=1e-6)
    record = read_info(folder / "adapter").training
    assert record["progress"]["step"] == ITERATIONS and record["settings"]["optim"]["lr"] == 1e-3


def test_a_finished_run_is_not_trained_further(run, tmp_path):
    before = finished(run[0])
    train(config(run[0]), tiny_pipe(), quiet)
    assert_same(finished(run[0]), before)


@pytest.mark.slow
def test_a_run_out_of_time_saves_and_goes_on_to_the_same_bits(run, tmp_path):
    messages = []
    train(config(tmp_path, stop_after=1e-6), tiny_pipe(), messages.append)
    assert "stopped at iteration 1 of 12" in messages[-1] and "run the same command to go on" in messages[-1]
    assert (tmp_path / "adapter").is_dir()
    train(config(tmp_path), tiny_pipe(), messages.append)
    assert any("at iteration 1 of 12" in m and "resuming" in m for m in messages)
    assert_same(finished(tmp_path), finished(run[0]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(run, tmp_path, number):
    messages, pipe = [], tiny_pipe()
    inner = pipe.transformer.forward
    calls = iter(range(10**6))

    def forward(*args, **kwargs):
        if next(calls) == 60:  # somewhere in an iteration; torchrun says it again
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    pipe.transformer.forward = forward
    usual = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name}, saved") as stop:
        train(config(tmp_path), pipe, messages.append)
    assert stop.value.code == 128 + number and signal.getsignal(number) == usual
    assert "run the same command to go on" in messages[-1]
    assert finished(tmp_path)[0]
    train(config(tmp_path), tiny_pipe(), quiet)
    assert_same(finished(tmp_path), finished(run[0]))


@pytest.fixture
def interruptible():
    """SIGINT as a terminal gives it; a job in the background may have been started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_whoever_insists_is_obeyed(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_signals() as caught:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        time.sleep(0.01)  # more than a clock's tick
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def shapes(tmp_path):
    """A data set of prompts, some for wide images and some for high ones."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for k, color in enumerate(("red", "blue", "green", "yellow")):
        rows = [
            {"prompt": f"{count} {color} {shape}", "height": height, "width": 80 - height}
            for count in ("a", "two", "three")
            for shape, height in (("ring", 32), ("circle", 40), ("square", 48), ("triangle", 40))
        ]
        (tmp_path / "set" / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(prompts=str(tmp_path / "set"), cache=False, buckets=True, held_out_count=2, teacher_steps=4)
    return dataclasses.replace(data, height=48, width=48)


@pytest.mark.slow
def test_a_streamed_run_in_several_image_sizes_goes_on_to_the_same_bits(shapes, tmp_path):
    train(config(tmp_path / "whole", data=shapes, optim__iterations=3), tiny_pipe(), quiet)
    for _ in range(3):
        train(config(tmp_path / "left", data=shapes, optim__iterations=3, stop_after=1e-9), tiny_pipe(), quiet)
    assert_same(finished(tmp_path / "left"), finished(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_on_stored_embeddings_needs_no_text_encoder(run, tmp_path):
    pipe = tiny_pipe()
    data = open_prompts(config(tmp_path).data, seed=0, batch=4)
    texts = [row.text for row in data.train] + data.held_out.prompts
    about = {"model": "world", "max_sequence_length": None}
    cache.make(tmp_path / "cache", partial(network.encode_text, pipe), texts, about=about, dtype="float32", log=quiet)
    pipe.text_encoder = pipe.text_encoder_2 = None
    folder = train(config(tmp_path / "run", data__embeddings=str(tmp_path / "cache")), pipe, quiet)
    mine, theirs = (
        [line.get("loss", 0.0) for line in files.read_lines(where / "log.jsonl")] for where in (folder, run[0])
    )
    assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.long
def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    run = subprocess.run(
        [sys.executable, __file__, tmp_path], env={**os.environ, **here}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["killed"] * 20
    assert_same(finished(tmp_path / "killed"), finished(tmp_path / "whole"))


def long_run(folder):
    train(config(folder, optim__iterations=250, eval_every=25, pictures=0, save_every=2), tiny_pipe(), quiet)


def kill_often(folder):
    """A run in children of this process, each killed at a random moment but the last; and one that is left alone. None
    goes far before it is killed, so that on no machine, however fast, the twenty together reach the end."""
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    fork, moments = multiprocessing.get_context("fork"), random.Random(0)
    log = folder / "killed" / "log.jsonl"
    for _ in range(20):
        enough = lines(log) + moments.randrange(12)
        child = fork.Process(target=long_run, args=(folder / "killed",))
        child.start()
        time.sleep(moments.uniform(0, 0.3))
        while lines(log) < enough and child.is_alive():
            time.sleep(moments.uniform(0, 0.02))
        child.kill()
        child.join()
        print("killed" if child.exitcode == -signal.SIGKILL else "ended")
    for name in ("killed", "whole"):
        child = fork.Process(target=long_run, args=(folder / name,))
        child.start()
        child.join()
        assert child.exitcode == 0


def lines(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_a_broken_newest_checkpoint_costs_only_what_came_after_the_one_before(run, tmp_path):
    messages = []
    train(config(tmp_path), tiny_pipe(), quiet)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    train(config(tmp_path), tiny_pipe(), messages.append)
    assert any("skipping" in m and newest.name in m for m in messages)
    assert_same(finished(tmp_path), finished(run[0]))


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    pipe = tiny_pipe()
    inner, calls = pipe.transformer.forward, []

    def forward(*args, **kwargs):
        (out,) = inner(*args, **kwargs)
        calls.append(out.requires_grad)
        return (out * math.nan,) if out.requires_grad and sum(calls) == 3 else (out,)  # in the second iteration

    pipe.transformer.forward = forward
    train(config(tmp_path, optim__iterations=3), pipe, quiet)
    lines = [line for line in files.read_lines(tmp_path / "log.jsonl") if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is None and lines[2]["loss"] is not None
    assert all(value.isfinite().all() for value in finished(tmp_path)[0].values())


@pytest.mark.slow
def test_a_run_that_only_skips_ends_with_a_diagnosis(tmp_path):
    pipe = tiny_pipe()
    inner = pipe.transformer.forward

    def forward(*args, **kwargs):
        (out,) = inner(*args, **kwargs)
        return (out * math.nan if out.requires_grad else out,)

    pipe.transformer.forward = forward
    with pytest.raises(ValueError, match=r"3 iterations in a row.* loss nan.*not finite in .* tensors.*lower optim.lr"):
        train(config(tmp_path, optim__most_skipped=3), pipe, quiet)


def test_a_spike_is_skipped_and_what_is_usual_follows_the_norm():
    progress, optim = Progress(), Optim(spike=10.0, clip_from=1)
    norms = [100.0, 1.0, 1.0, 40.0, math.inf, 700.0, 1.0]
    assert [accepted(progress, norm, step, optim) for step, norm in enumerate(norms)] == [True] * 4 + [
        False,
        True,
        True,
    ]
    assert 70 < progress.usual_norm < 100 and (progress.skipped, progress.in_a_row) == (1, 0)
    assert not accepted(progress, 1001.0, 7, optim) and progress.in_a_row == 1
    assert accepted(progress, 1001.0, 7, Optim())


@pytest.mark.slow
def test_gradient_checkpointing_changes_memory_not_gradients(tmp_path):
    def first_line(checkpointing):
        folder = train(
            config(tmp_path / str(checkpointing), optim__iterations=1, model__gradient_checkpointing=checkpointing),
            tiny_pipe(),
            quiet,
        )
        return next(line for line in files.read_lines(folder / "log.jsonl") if "loss" in line)

    plain, checkpointed = first_line(False), first_line(True)
    assert checkpointed["loss"] == plain["loss"]
    assert checkpointed["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing(tmp_path):
    def losses(size):
        changes = {"optim__batch": 5, "optim__iterations": 3, "optim__micro_batch": size, "model__dropout": 0.0}
        folder = train(config(tmp_path / str(size), **changes), tiny_pipe(), quiet)
        return [value for line in files.read_lines(folder / "log.jsonl") for value in line.values()]

    assert losses(2) == pytest.approx(losses(None), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        {"model__targets": "all"},
        {"model__targets": "full"},
        {"model__lora": False},
        {"model__modes": 1, "distill__mode_dropout": 0.0},
        {"distill__steps": 1},
        {"distill__steps": 8, "distill__states": 1},
        {"distill__final_step_scale": 0.5, "distill__window": 0},
        {"distill__spread": "stratified", "distill__solver": "adams", "distill__handover": "student"},
        {"distill__teacher_cfg": 4.0},
        {"optim__directions": "segment"},
        {"model__form": "coefficients"},
        {"model__form": "coefficients", "distill__also_steps": (1, 3), "optim__directions": "segment"},
    ],
    ids=lambda choice: " ".join(f"{name.partition('__')[2]}={value}" for name, value in choice.items()),
)
def test_every_choice_trains_and_its_adapter_samples(choice, tmp_path):
    """On the teacher's path, then on the student's own."""
    changes = {"distill__hold": 2, "distill__decay": 0, "pictures": 0, "optim__iterations": 4, **choice}
    folder = train(config(tmp_path, **changes), tiny_pipe(), quiet)
    lines = [line for line in files.read_lines(folder / "log.jsonl") if "loss" in line]
    assert [line["teacher_ratio"] for line in lines] == [1.0, 1.0, 0.0, 0.0]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines) and lines[-1]["skipped"] == 0
    fresh, info = tiny_pipe(), read_info(folder / "adapter")
    attach(fresh, folder / "adapter")
    cond, x = network.encode_prompts(fresh, ["a red ring"], height=8, width=8), network.noise(fresh, [1], 8, 8)
    grid = step_grid(info.steps, info.shift, info.final_step_scale)
    assert arcs(lambda x, s, c: student.predict(fresh.transformer, x, s, c), x, cond, grid).isfinite().all()


@pytest.mark.slow
def test_shapes_of_images_are_honored_whether_text_is_cached_or_not(tmp_path):
    """In memory, encoded batch by batch, or on the disk: the same losses, over images of several shapes."""
    pytest.importorskip("pyarrow")
    rows = [
        {"prompt": f"{count} {color} ring", "height": height, "width": 80 - height}
        for count in ("a", "two", "three")
        for color, height in (("red", 32), ("blue", 40), ("green", 48), ("yellow", 32))
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(prompts=str(tmp_path / "list.jsonl"), buckets=True, held_out_count=2, teacher_steps=2)
    data = dataclasses.replace(data, height=48, width=48)
    about = {"model": "world", "max_sequence_length": None}
    encode = partial(network.encode_text, tiny_pipe())
    texts = [row["prompt"] for row in rows]
    cache.make(tmp_path / "cache", encode, texts, about=about, dtype="float32", log=quiet)

    def losses(name, **changes):
        chosen = dataclasses.replace(data, **changes)
        folder = train(config(tmp_path / name, data=chosen, optim__iterations=3, optim__batch=3), tiny_pipe(), quiet)
        return [line["loss"] for line in files.read_lines(folder / "log.jsonl") if "loss" in line]

    sizes = open_prompts(data, seed=0, batch=3)
    assert len({sizes.batch(step).size for step in range(3)}) > 1
    in_memory = losses("memory")
    assert losses("flying", cache=False) == pytest.approx(in_memory, rel=1e-4)
    assert losses("disk", embeddings=str(tmp_path / "cache")) == pytest.approx(in_memory, rel=1e-4)


@pytest.mark.slow
def test_one_student_learns_several_numbers_of_steps_in_turn(tmp_path):
    folder = train(config(tmp_path, distill__also_steps=(1, 3), optim__iterations=6), tiny_pipe(), quiet)
    lines = files.read_lines(folder / "log.jsonl")
    segments = [sum(name.startswith("loss_") for name in line) for line in lines if "loss" in line]
    assert segments == [2, 1, 3, 2, 1, 3]
    assert all({"distance", "distance_1", "distance_3"} <= set(line) for line in lines if "distance" in line)
    assert read_info(folder / "adapter").also_steps == (1, 3)


@pytest.mark.slow
def test_a_run_may_start_its_later_segments_from_images(tmp_path):
    data = dataclasses.replace(with_images(tmp_path, 8), height=8, width=8, held_out_count=3, teacher_steps=2)
    folder = train(config(tmp_path / "run", data=data, optim__iterations=3), tiny_pipe(), quiet)
    first, *_ = (line for line in files.read_lines(folder / "log.jsonl") if "loss" in line)
    plain = dataclasses.replace(data, images=False)
    folder = train(config(tmp_path / "plain", data=plain, optim__iterations=3), tiny_pipe(), quiet)
    other, *_ = (line for line in files.read_lines(folder / "log.jsonl") if "loss" in line)
    assert first["loss_1"] == other["loss_1"] and first["loss_2"] != other["loss_2"]


@pytest.mark.slow
def test_the_curves_go_to_a_tracker_too(tmp_path, monkeypatch):
    """A stand-in for the package, with the four names that wandb and trackio share."""
    settings, lines = [], []
    run = SimpleNamespace(
        log=lambda values, step: lines.append({**values, "step": step}), finish=lambda: lines.append(0)
    )
    library = ModuleType("trackio")
    library.init = lambda **given: settings.append(given) or run
    library.Image = lambda image: image.shape
    monkeypatch.setitem(sys.modules, "trackio", library)
    folder = train(config(tmp_path / "run", tracker="trackio", optim__iterations=2), tiny_pipe(), quiet)
    ((given,), own), end = (settings, (folder / "tracker.txt").read_text()), lines.pop()
    assert (given["project"], given["name"], end) == ("arcflow", own, 0) and own.startswith("run-")
    assert given["config"]["optim"]["iterations"] == 2
    images = [line for line in lines if HELD_OUT in line]
    assert images == [{HELD_OUT: (2 * 8, 3 * 8, 3), "step": step} for step in (0, 2)]
    numbers = [line for line in lines if line not in images]
    told = [line for line in numbers if not any(name.startswith("speed/") for name in line)]
    assert told == [{k: v for k, v in line.items() if v is not None} for line in files.read_lines(folder / "log.jsonl")]
    with pytest.raises(ValueError, match="tracker = 'wandb' takes wandb, which is not here"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        train(config(tmp_path / "other", tracker="wandb"), tiny_pipe(), quiet)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_tracker_itself_takes_curves_and_images_and_is_taken_up(name, tmp_path, monkeypatch):
    """Where it is installed; nothing leaves this machine."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": kept, "TRACKIO_DIR": kept}.items():
        monkeypatch.setenv(key, str(value))
    library = pytest.importorskip(name)  # trackio looks for its folder here
    runs, init = [], library.init
    monkeypatch.setattr(library, "init", lambda **settings: runs.append(init(**settings)) or runs[-1])
    for _ in range(2):
        train(config(tmp_path / "run", tracker=name, optim__iterations=2, stop_after=1e-9), tiny_pipe(), quiet)
    names = [run.id if name == "wandb" else run.name for run in runs]
    assert names == 2 * [(tmp_path / "run" / "tracker.txt").read_text()]
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert any(path.suffix == ".png" for path in files)
    assert any(b"velocity_error" in path.read_bytes() for path in files)


def test_another_run_in_the_folder_is_not_overwritten(run):
    with pytest.raises(ValueError, match=r"other settings \(optim.lr: 0.001 there, 0.01 now\).*another folder"):
        claim_run(config(run[0], optim__lr=0.01), Ranks())
    claim_run(config(run[0], eval_every=2), Ranks())
    claim_run(config(run[0]), Ranks())


@pytest.mark.parametrize("change", [{"optim__batch": 8}, {"seed": 1}, {"model__dtype": "bfloat16"}], ids=str)
def test_what_a_run_learns_from_is_part_of_the_run(tmp_path, change):
    claim_run(config(tmp_path), Ranks())
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=f"other settings .{next(iter(change)).replace('__', '.')}: .* there, .* now"):
        claim_run(config(tmp_path, **change), Ranks())


SHORT = Data(count=16, held_out_count=2, teacher_steps=2, height=8, width=8)


@pytest.mark.slow
def test_weights_and_average_of_a_bfloat16_base_are_float32_on_the_disk(tmp_path):
    run = config(tmp_path, data=SHORT, model__dtype="bfloat16", optim__iterations=2, optim__ema_from=1, pictures=0)
    tensors, _ = finished(train(run, tiny_pipe(), quiet))
    assert {name.partition(".")[0] for name in tensors} >= {"ema", "optimizer"}
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_a_dropout_is_off_while_the_distance_is_measured(tmp_path):
    still = {"model__dropout": 0.9, "optim__lr": 1e-9, "optim__lr_log_gamma": 1e-9, "eval_every": 1, "pictures": 0}
    folder = train(config(tmp_path, data=SHORT, optim__iterations=3, **still), tiny_pipe(), quiet)
    distances = [line["distance"] for line in files.read_lines(folder / "log.jsonl") if "distance" in line]
    assert len(distances) == 4 and distances == pytest.approx(4 * distances[:1], rel=1e-5)


def test_a_pipeline_is_trained_once(tmp_path):
    pipe = tiny_pipe()
    student.build(pipe.transformer, modes=4, rank=4)
    with pytest.raises(ValueError, match="is a student already; call arcflow.student.remove"):
        train(config(tmp_path / "run", data=SHORT), pipe, quiet)
    assert not (tmp_path / "run").exists()


def test_an_image_that_no_token_fits_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="image size 10 x 8: both must be multiples of 4"):
        train(config(tmp_path / "run", data=dataclasses.replace(SHORT, height=10)), tiny_pipe(), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frames_that_the_model_does_not_draw_are_refused_before_anything_is_written(tmp_path, streamed):
    """Whether the list is read whole or as it goes, and its held-out prompts are its own or a file's."""
    rows, held_out = tmp_path / "set" / "rows.jsonl", tmp_path / "held_out.txt"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps({"prompt": f"p{i}", "frames": 9}) + "\n" for i in range(4)))
    held_out.write_text("a red ring\n")
    prompts = f"{rows.parent}/" if streamed else str(rows)
    data = dataclasses.replace(SHORT, prompts=prompts, held_out=str(held_out), buckets=True, cache=False)
    with pytest.raises(ValueError, match="set.* asks for 9 frames: flux draws images; expected 1"):
        train(config(tmp_path / "run", data=data), tiny_pipe(), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_prompt_is_enough_and_no_token_of_an_account_is_left_behind(tmp_path, monkeypatch):
    secret = "hf_" + "q" * 34
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    (tmp_path / "one.txt").write_text("a red ring\n")
    (tmp_path / "held_out.txt").write_text("a blue ring\n")
    data = dataclasses.replace(SHORT, prompts=str(tmp_path / "one.txt"), held_out=str(tmp_path / "held_out.txt"))
    folder = train(config(tmp_path / "run", data=data, optim__iterations=1, pictures=0), tiny_pipe(), quiet)
    model_card.export(str(folder / "adapter"), tmp_path / "out")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 10 and not [path for path in left if secret.encode() in path.read_bytes()]


def test_the_rate_warms_up_stays_and_cools_down():
    optim = Optim(iterations=1000, warmup=100)
    assert [rate(i, optim) for i in (0, 50, 100, 999)] == pytest.approx([0.001, 0.5005, 1.0, 1.0])
    for shape in ("linear", "cosine"):
        cooled = Optim(iterations=1000, warmup=100, cooldown=shape, cooldown_iterations=200)
        assert [rate(i, cooled) for i in (100, 800, 900, 1000)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_the_log_gamma_part_has_a_rate_of_its_own():
    net = student.build(tiny_pipe().transformer, modes=4, rank=4)
    main, gammas = adamw(student.trainable(net), Optim()).param_groups
    assert (main["peak"], gammas["peak"]) == (1e-4, 1e-5)
    assert [tuple(p.shape) for p in gammas["params"]] == [(12, 32), (12,)]


def test_a_missing_device_is_named_with_what_is_there():
    if torch.backends.mps.is_available():
        pytest.skip("mps is here")
    with pytest.raises(ValueError, match="device 'mps' is not here: expected one of .*cpu; take auto"):
        torch_device("mps")


if __name__ == "__main__":
    kill_often(Path(sys.argv[1]))


def test_attention_on_a_gpu_is_not_cudnns_while_a_run_lasts():
    """Its backward pass fails for FLUX on an H100."""
    chosen = torch.backends.cuda.cudnn_sdp_enabled
    before = chosen()
    with attention(torch.device("cuda")):
        assert not chosen() and torch.backends.cuda.flash_sdp_enabled()
    with attention(torch.device("cpu")):
        assert chosen() == before
    assert chosen() == before
