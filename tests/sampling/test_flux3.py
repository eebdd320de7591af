"""FLUX.3, which diffusers has as modular blocks alone: a student in them, and its network called as they call it."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux3Transformer2DModel,
    modular_pipelines,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import arcflow
from arcflow import student
from arcflow.config import Model
from arcflow.families import loading, network, weights
from arcflow.sampling.open import settle
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.student import adapter, views
from tests.support.families import chatting, loud
from tests.support.pipelines import SIDE, WORDS, perturb

pytestmark = pytest.mark.filterwarnings("ignore:You are updating:UserWarning")


class Words:
    """What the blocks use of Qwen's processor."""

    def __init__(self) -> None:
        self.tokenizer = chatting(512)
        self.apply_chat_template = self.tokenizer.apply_chat_template


@pytest.fixture(scope="module")
def made() -> Any:
    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=33, num_attention_heads=2, num_key_value_heads=2
    )
    sight = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = Qwen3VLConfig(text_config={**text, "head_dim": 8, "vocab_size": len(WORDS)}, vision_config=sight)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "transformer": loud(
                Flux3Transformer2DModel(
                    in_channels=16,
                    cond_in_channels=16,
                    num_layers=1,
                    num_single_layers=1,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=128,
                    timestep_channels=16,
                    axes_dims_rope=(4, 4, 4, 4),
                )
            ),
            "vae": AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(4, 4),
                norm_num_groups=2,
                latent_channels=4,
            ).eval(),
            "text_encoder": Qwen3VLForConditionalGeneration(config).eval(),
        }
    blocks = modular_pipelines.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")  # a prompt is drawn as it was distilled: as it is written
    pipe = blocks.init_pipeline()
    unguided = ClassifierFreeGuidance(guidance_scale=1.0)
    pipe.update_components(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.2), guider=unguided)
    pipe.tokenizer = Words()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Parts(DiffusionPipeline):
    """The same parts as a pipeline, as the network is asked by."""

    def __init__(self, modular: Any) -> None:
        super().__init__()
        for name in ("transformer", "vae", "text_encoder", "tokenizer"):
            setattr(self, name, getattr(modular, name))
        self.vae_scale_factor = modular.vae_scale_factor


@pytest.fixture
def pipe(made):
    pipe = copy.copy(made)
    pipe.transformer, pipe.scheduler = copy.deepcopy(made.transformer), copy.deepcopy(made.scheduler)
    return pipe


def draw(pipe: Any, output: str = "latents") -> Any:
    noise = torch.Generator().manual_seed(0)
    return pipe(
        prompt="a red cube",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        generator=noise,
        output_type="pt",
        output=output,
    )


def test_the_network_is_called_as_the_blocks_call_it(pipe):
    taken = []
    pipe.transformer.register_forward_hook(
        lambda net, args, told, output: taken.append((told["hidden_states"], told["timestep"], output[0])),
        with_kwargs=True,
    )
    draw(pipe)
    cond = network.encode_prompts(Parts(pipe), ["a red cube"], height=SIDE, width=SIDE)
    assert torch.equal(taken[0][0], network.noise(Parts(pipe), [0], SIDE, SIDE))
    for x, sigma, v in list(taken):
        assert torch.equal(network.call(pipe.transformer, x, float(sigma[0]), cond), v)


def test_a_student_draws_what_it_walks_and_leaves_no_trace(pipe, tmp_path):
    before = draw(pipe, "images")
    net = student.build(copy.deepcopy(pipe.transformer), modes=3, rank=2, targets="all")
    perturb(net)
    folder = adapter.save_adapter(net, tmp_path)
    arcflow.attach(pipe, folder)
    drawn = draw(pipe, "images")
    x, cond = (
        network.noise(Parts(pipe), [0], SIDE, SIDE),
        network.encode_prompts(Parts(pipe), ["a red cube"], height=SIDE, width=SIDE),
    )
    grid = pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for start, end in zip(grid, grid[1:], strict=False):
            x = x - student.predict(pipe.transformer, x, start, cond).displacement(0.0, start - end)
    image = torch.from_numpy(network.decode(Parts(pipe), x, SIDE, SIDE)).movedim(-1, 1) / 255
    assert (image - drawn).abs().max() <= 1 / 255 and not torch.allclose(drawn, before, atol=1e-2)
    arcflow.detach(pipe)
    assert torch.equal(draw(pipe, "images"), before)


def test_what_is_trained_has_a_gradient_and_the_teacher_is_the_base(pipe):
    x, cond = (
        network.noise(Parts(pipe), [0], SIDE, SIDE),
        network.encode_prompts(Parts(pipe), ["a red cube"], height=SIDE, width=SIDE),
    )
    velocity = network.call(pipe.transformer, x, 0.6, cond)
    net = student.build(pipe.transformer, modes=3, rank=2, targets="all")
    perturb(net)
    assert torch.equal(views.teacher_velocity(net, x, 0.6, cond), velocity.float())
    path = student.predict(net, x, 0.7, cond)
    (path.velocity(0.2).square().mean() + path.logits.square().mean()).backward()
    silent = [name for name, p in student.trainable(net).items() if p.grad is None or not p.grad.any()]
    assert not silent and len(weights.lora_names(net)) == 8


def test_modular_blocks_are_refused_where_a_pipeline_is_needed(tmp_path):
    """By `arcflow train`, which loads a teacher, and by `arcflow sample`, before anything is loaded."""
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is made of modular blocks, .*: expected a pipeline"):
        loading.load_pipe(Model(base=str(tmp_path)))
    with pytest.raises(ValueError, match="is made of modular blocks, .*: expected a pipeline"):
        settle(ModelAndAdapter(model=str(tmp_path), adapter="none"), Drawing(), Machine(device="cpu"))


def test_prompts_of_other_windows_are_no_batch(pipe):
    with pytest.raises(ValueError, match="windows of 80 and 160 tokens: FLUX.3 takes a batch of equally long ones"):
        network.encode_prompts(Parts(pipe), ["a", "a " * 100], height=SIDE, width=SIDE)
