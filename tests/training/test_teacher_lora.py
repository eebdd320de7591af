"""Training on a base that is not plain: with a LoRA of the user's own on it, and compiled."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import arcflow
from arcflow import cli
from arcflow.config import Model, Run
from arcflow.families import network
from arcflow.families.loading import load_pipe
from arcflow.reports import model_card
from arcflow.student.adapter import read_info
from arcflow.system import files, processes
from arcflow.training import learner, loop
from tests.support.pipelines import qwen_pipeline, save_style
from tests.support.trainings import config, quiet, tiny_pipe

pytestmark = pytest.mark.slow

STYLE = ["to_q", "ff.net.2", "proj_mlp"]
"""Attention, which the student leaves alone, and layers that it tunes too."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a base, and with a LoRA for it."""
    folder = tmp_path_factory.mktemp("shelf")
    pipe = tiny_pipe()
    pipe.vae.register_to_config(shift_factor=0.1)  # which the stock pipeline insists on
    pipe.save_pretrained(folder / "base")
    save_style(pipe, folder / "style", STYLE)
    return folder


def settings(shelf, out, **changes):
    return config(out, model__base=str(shelf / "base"), optim__iterations=3, pictures=0, **changes)


@pytest.fixture(scope="module")
def styled(shelf, tmp_path_factory):
    """A training whose teacher is a base with a LoRA: the configuration, and the folder it left."""
    run = settings(shelf, tmp_path_factory.mktemp("run"), model__teacher_lora=str(shelf / "style"))
    return run, loop.train(run, log=quiet)


def open_base(shelf, lora=False):
    return load_pipe(Model(base=str(shelf / "base"), teacher_lora=str(shelf / "style") if lora else None))


def inputs(pipe):
    cond = network.encode_prompts(pipe, ["a red ring", "two blue squares"], height=8, width=8)
    return network.noise(pipe, [1, 2], 8, 8), 0.7, cond


def losses(folder):
    return [line["loss"] for line in files.read_lines(folder / "log.jsonl") if "loss" in line]


def test_the_teacher_is_the_base_with_the_lora(shelf, styled):
    pipe, plain = open_base(shelf, lora=True), open_base(shelf)
    with torch.no_grad():
        wanted = network.call(pipe.transformer, *inputs(pipe))
        assert not torch.allclose(wanted, network.call(plain.transformer, *inputs(plain)), atol=1e-2)
        parameters = learner.build_student(pipe.transformer, styled[0], processes.Ranks())
        _, teacher = learner.views(pipe.transformer, None, 1.0)
        x, sigma, cond = inputs(pipe)
        assert torch.equal(teacher(x, torch.full((2,), sigma), cond), wanted)
    assert not any("default" in name for name in parameters)
    trained = {id(p) for p in parameters.values()}
    assert trained == {id(p) for p in pipe.transformer.parameters() if p.requires_grad}


def test_what_is_learned_is_that_teacher(shelf, styled):
    """The same training on a base that has the LoRA in its weights has the same losses."""
    pipe = open_base(shelf, lora=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = loop.train(settings(shelf, styled[1].parent / "fused"), pipe, quiet)
    plain = loop.train(settings(shelf, styled[1].parent / "plain"), open_base(shelf), quiet)
    assert losses(styled[1]) == pytest.approx(losses(fused), rel=1e-4)
    assert losses(styled[1]) != pytest.approx(losses(plain), rel=1e-2)


def test_the_adapter_goes_on_a_pipeline_with_that_lora_and_says_so(shelf, styled):
    _, folder = styled
    assert read_info(folder / "adapter").teacher_lora == str(shelf / "style")
    pipe = open_base(shelf, lora=True)
    arcflow.attach(pipe, folder / "adapter")
    image = pipe("a red ring", num_inference_steps=2, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
    with pytest.warns(UserWarning, match="distilled from its base with a LoRA on it, which this pipeline does not"):
        arcflow.attach(open_base(shelf), folder / "adapter")
    card = (model_card.export(str(folder / "adapter"), folder / "out") / "README.md").read_text()
    before, after = card.index("pipe.load_lora_weights("), card.index("arcflow.attach(")
    assert before < after
    assert "| LoRA of the teacher, needed with it | style |" in card and str(shelf) not in card


def test_the_command_line_samples_with_that_lora(shelf, styled, tmp_path, capsys):
    words = ["--model", str(shelf / "base"), "--adapter", str(styled[1] / "adapter"), "--out", str(tmp_path)]
    words = ["sample", "--prompt", "a red ring", "--height", "8", *words, "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert f"expected --teacher-lora {shelf / 'style'}" in capsys.readouterr().err
    cli.main([*words, "--teacher-lora", str(shelf / "style")])
    assert "new images: 1;" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["today's names", "older names"])
def test_a_lora_of_text_encoders_too_needs_them(prefix, shelf, tmp_path):
    pipe = open_base(shelf, lora=True)
    encoder = copy.deepcopy(pipe.text_encoder)
    encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    text = {prefix + name.replace(".default", ""): p for name, p in encoder.state_dict().items() if "lora" in name}
    style = load_file(shelf / "style" / "pytorch_lora_weights.safetensors")
    style = {name.removeprefix("transformer."): value for name, value in style.items()}
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=style, text_encoder_lora_layers=text)
    model = Model(base=str(shelf / "base"), teacher_lora=str(tmp_path))
    assert any(isinstance(module, LoraLayer) for module in load_pipe(model).text_encoder.modules())
    with pytest.raises(ValueError, match="changes what this pipeline lacks .*text_encoder.* data.embeddings"):
        load_pipe(model, text=False)


class Payload:
    """What a pickle does where it is read."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


def test_nothing_of_a_lora_or_a_base_is_run(shelf, tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "lora").mkdir()
    torch.save({"transformer.x.lora_A.weight": Payload(trace)}, tmp_path / "lora" / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="lora' cannot be loaded"):
        load_pipe(Model(base=str(shelf / "base"), teacher_lora=str(tmp_path / "lora")))
    base = shutil.copytree(shelf / "base", tmp_path / "base")
    for name in ("pipeline.py", "mine.py"):
        (base / name).write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
    index = json.loads((base / "model_index.json").read_text())
    for strange in ({"_class_name": ["mine", "Mine"]}, {"transformer": ["mine", "Mine"]}):
        (base / "model_index.json").write_text(json.dumps(index | strange))
        with pytest.raises(ValueError, match="mine"):
            load_pipe(Model(base=str(base)))
    assert not trace.exists()


def test_a_lora_that_is_missing_or_fits_nothing_is_named(shelf, tmp_path):
    other = save_style(qwen_pipeline(), tmp_path / "other", ["img_mlp.net.2"])
    save_file({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    deeper = tiny_pipe()
    deeper.transformer.transformer_blocks.append(copy.deepcopy(deeper.transformer.transformer_blocks[0]))
    part = save_style(deeper, tmp_path / "deeper", ["to_q"])
    for name, said in {
        str(
            tmp_path / "nowhere"
        ): "no LoRA .*nowhere.*: expected a file, a folder or a Hub id; check model.teacher_lora",
        str(shelf / "base"): "base' cannot be loaded",
        str(other): "the LoRA .*other.* does not fit FluxTransformer2DModel .* check model.base and model.teacher_lora",
        str(part): r"does not fit .*\(it has layers that are not here, as transformer.transformer_blocks.1.attn.to_q\)",
        str(tmp_path / "none.safetensors"): "does not fit FluxTransformer2DModel",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_pipe(Model(base=str(shelf / "base"), teacher_lora=name))
    with pytest.raises(ValueError, match="model.teacher_lora = 'style': expected None where every weight is trained"):
        Model(teacher_lora="style", targets="full")


def test_compiling_without_a_compiler_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run = Run(out=str(tmp_path / "run"), device="cpu", model=Model(compile=True))
    with pytest.raises(ValueError, match=r"model.compile = True: expected a C\+\+ compiler on the path; install g\+\+"):
        loop.train(run, log=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_student_learns_the_same(shelf, tmp_path):
    """Compiled kernels round differently: to 1e-5, over three iterations."""
    plain = loop.train(settings(shelf, tmp_path / "plain", model__dropout=0.0), log=quiet)
    fast = loop.train(settings(shelf, tmp_path / "fast", model__dropout=0.0, model__compile=True), log=quiet)
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)
    assert json.loads((fast / "run.json").read_text())["model"]["compile"]
    arcflow.attach(open_base(shelf), fast / "adapter")
