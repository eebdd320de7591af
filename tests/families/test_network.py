"""What the rows of the table promise, for each of them."""

import copy
import pickle

import pytest
import torch

from arcflow import families
from arcflow.families import network, weights
from tests.support.pipelines import SIDE, flux_transformer


def test_the_names_that_take_a_lora_are_linears_and_not_the_head(net):
    names = weights.lora_names(net)
    assert len(names) > 6 and len(set(names)) == len(names)
    assert all(isinstance(net.get_submodule(name), torch.nn.Linear) for name in names)
    assert families.family_of(net).head not in names


def test_a_row_goes_to_another_process_as_itself():
    assert all(pickle.loads(pickle.dumps(family)) is family for family in families.FAMILIES)


@pytest.mark.parametrize("pipe", ["flux", "qwen_image"], indirect=True)
def test_attention_is_left_alone(net):
    """Where it has Linears of its own: FLUX.2's single blocks share them with feed-forward."""
    assert not any(".attn." in name for name in weights.lora_names(net))


def test_a_sample_does_not_depend_on_its_batch(pipe):
    """Prompts of unequal length: padding is never attended to."""
    prompts, seeds = ["a red cube", "two blue ball on left of a green cube"], [3, 4]
    x = network.noise(pipe, seeds, SIDE, SIDE)
    both = network.encode_prompts(pipe, prompts, height=SIDE, width=SIDE)
    together = network.call(pipe.transformer, x, 0.5, both)
    for i, prompt in enumerate(prompts):
        cond = network.encode_prompts(pipe, [prompt], height=SIDE, width=SIDE)
        alone = network.call(pipe.transformer, network.noise(pipe, [seeds[i]], SIDE, SIDE), 0.5, cond)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_is_called_as_the_stock_pipeline_calls_it(pipe, dtype):
    """Bit for bit, the rounding of time included."""
    pipe = copy.deepcopy(pipe).to(dtype)
    calls = []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **inputs: (calls.append(inputs), forward(**inputs))[1]
    length = {"max_sequence_length": 8}
    pipe(prompt="a red cube", num_inference_steps=3, height=SIDE, width=SIDE, output_type="latent", **length)
    cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE, **length)
    for stock, sigma in zip(list(calls), pipe.scheduler.sigmas.tolist(), strict=False):
        network.call(pipe.transformer, stock["hidden_states"].float(), sigma, cond)
        for name, value in calls[-1].items():
            theirs = stock[name]
            if name.endswith("_ids"):  # the same for all samples; FLUX.2's pipeline repeats them
                assert torch.equal(value, theirs.view(value.shape)), name
            else:
                assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, name
    assert len(calls) == 6 and calls[-1]["timestep"].dtype == dtype


def test_noise_is_what_the_stock_pipeline_draws(pipe):
    seeds = [5, 6]
    start = {}
    stock = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x, **k: (start.setdefault("x", x), stock(output, t, x, **k))[1]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    prompts = ["a red cube", "a blue ball"]
    pipe(prompt=prompts, num_inference_steps=1, height=SIDE, width=SIDE, generator=generators, output_type="latent")
    assert torch.equal(network.noise(pipe, seeds, SIDE, SIDE), start["x"])


def test_images_are_those_of_the_stock_pipeline(pipe):
    def sample(kind):
        generator = [torch.Generator("cpu").manual_seed(7)]
        return pipe(
            prompt=["a red cube"], num_inference_steps=1, height=SIDE, width=SIDE, generator=generator, output_type=kind
        ).images

    (image,) = sample("pil")
    ours = network.decode(pipe, sample("latent"), SIDE, SIDE)
    assert ours.shape == (1, SIDE, SIDE, 3) and ours.tobytes() == image.tobytes()


def test_images_become_latents_that_decode_as_the_autoencoder_says(pipe):
    images = torch.randint(256, (1, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    x = network.encode_images(pipe, images)
    unit = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    video = unit.unsqueeze(2) if hasattr(pipe.vae.config, "temperal_downsample") else unit
    wanted = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample.flatten(2).squeeze(0)
    decoded = torch.from_numpy(network.decode(pipe, x, SIDE, SIDE)).permute(0, 3, 1, 2).flatten(2).squeeze(0)
    torch.testing.assert_close(decoded / 127.5 - 1, wanted.clamp(-1, 1), atol=1 / 127, rtol=0)


def test_guidance_is_an_input_where_the_backbone_has_one(flux):
    cond = network.encode_prompts(flux, ["a red cube"] * 2, height=SIDE, width=SIDE, guidance=2.0)
    assert cond["guidance"].tolist() == [2.0, 2.0]
    assert cond["encoder_hidden_states"].shape[1] == flux.tokenizer_2.model_max_length
    flux.transformer = flux_transformer(guidance_embeds=False)
    assert "guidance" not in network.encode_prompts(flux, ["a red cube"], height=SIDE, width=SIDE)


def test_other_models_and_sizes_are_refused_with_a_remedy(flux):
    with pytest.raises(ValueError, match="Linear is not a supported.*FluxTransformer2DModel, QwenImage"):
        families.family_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="multiples of 4"):
        network.noise(flux, [0], 15, 16)
    with pytest.raises(ValueError, match="expected 2 x 4 tokens"):
        network.decode(flux, network.noise(flux, [0], 16, 16), 8, 16)
