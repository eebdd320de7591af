"""The small teacher: stock parts, packed as FLUX packs, and a training that goes on where it stopped."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arcflow.families.conditioning import repeat
from arcflow.training import flow
from arcflow.training.pretrain import Batches, Pretrain, Stage, minimize, train_teacher
from arcflow.world.autoencoder import autoencoder_loss, build_autoencoder, plain_map, scenes
from arcflow.world.scene import Object, Scene, sample_prompts
from arcflow.world.teacher import build_transformer, load_teacher
from arcflow.world.text import (
    MAX_LENGTH,
    VOCABULARY,
    Probes,
    build_clip,
    build_t5,
    build_tokenizer,
    captions,
    text_loss,
    tokenize,
)


@pytest.mark.slow
def test_every_caption_is_known_words_and_fits() -> None:
    ids = tokenize(build_tokenizer(), [prompt.text for prompt in sample_prompts(500, seed=0)])
    assert ids.shape == (500, MAX_LENGTH)
    assert not (ids == VOCABULARY["<unk>"]).any()
    assert (ids == VOCABULARY["</s>"]).sum(1).eq(1).all()


def test_guidance_of_one_is_the_captioned_velocity_and_of_zero_the_empty_one() -> None:
    torch.manual_seed(0)
    net, t5, clip = build_transformer(), build_t5(), build_clip()
    for p in net.parameters():  # its output starts at zero
        nn.init.normal_(p, std=0.05)
    x, sigma = torch.randn(2, 16, 32), torch.full((2,), 0.5)
    cond, empty = (flow.encode(t5, clip, texts) for texts in (["a red ring", "two blue squares"], [""]))
    with torch.no_grad():
        for scale, words in ((1.0, cond), (0.0, repeat(empty, 2))):
            got = flow.guided_by_captions(net, empty, torch.full((2,), scale))(x, sigma, flow.at_guidance(cond, 1.0))
            expected = flow.velocity_of(net)(x, sigma, flow.at_guidance(words, 1.0))
            assert expected.std() > 0.1
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_plain_map_keeps_background_place_shape_and_color_apart() -> None:
    ring = Object("ring", "red", 20.0, 44.0, 6.5)
    there = plain_map([Scene("black", (ring,))])[0]

    def changed(scene: Scene) -> list[int]:
        return [c for c, channel in enumerate(plain_map([scene])[0] - there) if channel.abs().max() > 1e-6]

    assert changed(Scene("white", (ring,))) == [0]
    assert changed(Scene("black", (replace(ring, color="blue"),))) == [2, 3]
    assert changed(Scene("black", (replace(ring, shape="circle"),))) == [4, 5]
    assert changed(Scene("black", (replace(ring, x=24.0),))) == [1, 2, 5, 6, 7]
    row, column = divmod(int(there[1].argmax()), 8)
    assert (row, column) == (44 // 8, 20 // 8)


@pytest.mark.slow
def test_each_stage_reaches_all_the_parameters_it_trains() -> None:
    torch.manual_seed(0)
    t5, clip, probes, prompts = build_t5(), build_clip(), Probes(), captions(64, "words")
    text_loss(t5, clip, probes, prompts, tokenize(build_tokenizer(), [p.text for p in prompts])).backward()
    vae = build_autoencoder()
    autoencoder_loss(vae, torch.rand(2, 3, 64, 64), plain_map(scenes(2, "pictures"))).backward()
    net = build_transformer()
    batches = Batches(torch.randn(4, 16, 32), ["a ring"] * 4, partial(flow.encode, t5, clip), 4)
    flow.flow_loss(net, *batches.at(0, "flow"), batches.empty()).backward()
    for module in (probes, vae, net):
        assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_an_epoch_shows_every_scene_once() -> None:
    latents = torch.arange(8.0).reshape(8, 1, 1)
    batches = Batches(latents, ["a ring"] * 8, partial(flow.encode, build_t5(), build_clip()), 2)
    seen = [batches.at(step, "flow")[0].flatten() for step in range(4)]
    assert sorted(torch.cat(seen).tolist()) == list(range(8))


@pytest.mark.slow
def test_an_interrupted_stage_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcflow.training.pretrain.SAVE_EVERY", 0.0)
    stage = Stage("line", steps=12, rate=0.1, ema=0.9)

    def run(out: Path, die_at: int | None = None) -> Tensor:
        torch.manual_seed(0)
        line = nn.Linear(3, 1)

        def loss(step: int) -> Tensor:
            if step == die_at:
                raise KeyboardInterrupt
            return (line(torch.randn(5, 3)) - 1).square().mean()

        minimize(stage, out, {"line": line}, loss)
        return line.weight.detach().clone()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", die_at=7)
    assert torch.equal(run(tmp_path / "killed"), whole)


@pytest.mark.long
def test_all_stages_one_after_the_other_with_their_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcflow.training.pretrain.SAVE_EVERY", 0.0)
    monkeypatch.setattr("arcflow.training.pretrain.PROBED", 6)
    short = Pretrain(text_steps=2, autoencoder_steps=2, scenes=256, flow_steps=2, guidance_steps=2, decoder_steps=2)
    folder = train_teacher(tmp_path, short)
    image = load_teacher(folder)("a ring", height=64, width=64, num_inference_steps=1, max_sequence_length=16)
    assert image.images[0].size == (64, 64)
    assert all(len((tmp_path / f"{stage}.jsonl").read_text().splitlines()) == 2 for stage in ("autoencoder", "flow"))
