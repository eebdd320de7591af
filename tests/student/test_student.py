"""One network that is teacher and student."""

import copy

import pytest
import torch
from peft import LoraConfig

from arcflow import student
from arcflow.families import network, weights
from arcflow.student import places, views
from arcflow.student.places import trainable_shapes
from arcflow.student.state import is_student, lora_layers, state_of
from tests.support.pipelines import flux_transformer, perturb


def trained(net, inputs, steps=1, **build):
    """A student after a few optimizer steps on its own outputs."""
    student.build(net, modes=4, rank=2, generator=torch.Generator().manual_seed(0), **build).train()
    optimizer = torch.optim.AdamW(student.trainable(net).values(), lr=1e-2)
    for _ in range(steps):
        student.predict(net, inputs.x, inputs.sigma, inputs.cond).displacement(0.0, 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def test_the_student_starts_as_its_teacher(net, inputs):
    u = network.call(net, inputs.x, inputs.sigma, inputs.cond)
    m = student.predict(student.build(net, modes=4, rank=2), inputs.x, inputs.sigma, inputs.cond)
    torch.testing.assert_close(m.v.mean(-2), u, rtol=0, atol=0.15)
    assert state_of(net).modes == 4 and m.v.shape == (*u.shape[:2], 4, u.shape[-1])


def test_no_call_of_a_student_or_its_teacher_asks_what_family_they_are(net, inputs, monkeypatch):
    student.build(net, modes=4, rank=2)

    def asked(transformer):
        raise AssertionError("the family is known since the student was built")

    for module in (network, weights, places):
        monkeypatch.setattr(module, "family_of", asked)
    student.predict(net, inputs.x, inputs.sigma, inputs.cond)
    views.teacher_velocity(net, inputs.x, inputs.sigma, inputs.cond)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_view_is_the_base_bit_for_bit_also_after_training(net, inputs, checkpointing):
    u = network.call(net, inputs.x, inputs.sigma, inputs.cond).detach()
    if checkpointing:
        net.enable_gradient_checkpointing()
    before = views.teacher_velocity(student.build(copy.deepcopy(net)), inputs.x, inputs.sigma, inputs.cond)
    trained(net, inputs, steps=2)
    moved = network.call(net, inputs.x, inputs.sigma, inputs.cond)[..., : u.shape[-1]]
    assert not torch.allclose(moved, u, atol=1e-2)
    assert torch.equal(before, u)
    assert torch.equal(views.teacher_velocity(net, inputs.x, inputs.sigma, inputs.cond), u)


@pytest.mark.parametrize("targets", ["feed_forward", "all"])
def test_gradients_are_where_trainable_and_nowhere_else(net, inputs, targets):
    names = set(weights.lora_names(net, targets))
    student.build(net, modes=4, rank=2, targets=targets)
    perturb(net)  # with B = 0, A has no gradient
    student.predict(net, inputs.x, inputs.sigma, inputs.cond).displacement(0.0, 0.5).square().mean().backward()
    named = student.trainable(net)
    assert all(p.requires_grad and p.dtype == torch.float32 and p.grad.any() for p in named.values())
    others = set(net.parameters()) - set(named.values())
    assert all(p.grad is None and not p.requires_grad for p in others)
    assert {name.rsplit(".lora_")[0] for name in named if ".lora_" in name} == names


def test_a_teacher_view_between_changes_no_gradient(net, inputs):
    """Also with checkpointing, where blocks are computed again in the backward pass."""

    def gradients(look, checkpointing):
        one = student.build(copy.deepcopy(net), modes=4, rank=2, generator=torch.Generator().manual_seed(0)).eval()
        if checkpointing:
            one.enable_gradient_checkpointing()
        loss = student.predict(one, inputs.x, inputs.sigma, inputs.cond).velocity(0.2).square().mean()
        if look:
            views.teacher_velocity(one, inputs.x, inputs.sigma, inputs.cond)
        loss.backward()
        return [p.grad for p in student.trainable(one).values()]

    plain = gradients(False, False)
    for look, checkpointing in [(True, False), (False, True), (True, True)]:
        for ours, wanted in zip(gradients(look, checkpointing), plain, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_the_teacher_view_ends_whatever_happens_and_may_be_nested(net, inputs):
    student.build(net, modes=4, rank=2).eval()
    grads = [p.requires_grad for p in net.parameters()]
    wide = network.call(net, inputs.x, inputs.sigma, inputs.cond)
    with pytest.raises(KeyError), student.teacher(net):
        with student.teacher(net):
            assert views.in_teacher_view(net)
        assert views.in_teacher_view(net)
        raise KeyError
    assert not views.in_teacher_view(net)
    assert torch.equal(network.call(net, inputs.x, inputs.sigma, inputs.cond), wide)
    assert [p.requires_grad for p in net.parameters()] == grads


def test_every_weight_may_be_tuned_instead(net, inputs):
    u = network.call(net, inputs.x, inputs.sigma, inputs.cond).detach()
    base, wanted = copy.deepcopy(net.state_dict()), trainable_shapes(net, 4, 0, "full")
    trained(net, inputs, steps=2, targets="full")
    named = student.trainable(net)
    assert {name: tuple(p.shape) for name, p in named.items()} == wanted
    assert {name for name in base if not name.startswith("proj_out")} <= set(named) and not lora_layers(net)
    assert not torch.allclose(network.call(net, inputs.x, inputs.sigma, inputs.cond)[..., : u.shape[-1]], u, atol=1e-2)
    assert torch.equal(views.teacher_velocity(net, inputs.x, inputs.sigma, inputs.cond), u)
    restored = student.remove(net).state_dict()
    assert restored.keys() == base.keys() and all(torch.equal(restored[name], base[name]) for name in base)


@pytest.mark.parametrize("targets", ["feed_forward", "all"])
def test_names_and_shapes_are_known_without_building(net, targets):
    wanted = trainable_shapes(net, 4, 2, targets)
    head_only = trainable_shapes(net, 4, 0)
    student.build(net, modes=4, rank=2, targets=targets)
    assert {name: tuple(p.shape) for name, p in student.trainable(net).items()} == wanted
    assert trainable_shapes(net, 4, 2, targets) == wanted
    assert len(wanted) > len(trainable_shapes(net, 4, 2)) or targets == "feed_forward"
    assert head_only == {name: shape for name, shape in wanted.items() if ".lora_" not in name}


def test_names_are_those_of_the_published_adapters():
    names = set(trainable_shapes(flux_transformer(num_layers=1), 16, 2))
    linears = [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
    linears += [f"transformer_blocks.0.{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", "2")]
    linears += [f"single_transformer_blocks.0.proj_{end}" for end in ("mlp", "out")]
    full = ["norm_out.linear", "proj_out_means", "proj_out_logweights", "proj_out_loggamma"]
    assert names == {f"{name}.lora_{side}.weight" for name in linears for side in "AB"} | {
        f"{name}.{part}" for name in full for part in ("weight", "bias")
    }


def test_lora_starts_at_nothing_with_a_of_std_one_over_rank(net):
    student.build(net, modes=2, rank=16)
    named = student.trainable(net)
    assert not any(p.any() for name, p in named.items() if "lora_B" in name)
    down = torch.cat([p.detach().flatten() for name, p in named.items() if "lora_A" in name])
    assert float(down.std()) == pytest.approx(1 / 16, rel=0.05)
    assert {low.scale for low in lora_layers(net).values()} == {1.0}


def test_a_generator_decides_the_start_and_the_global_one_is_left_alone(net):
    state = torch.get_rng_state()
    twins = [student.build(copy.deepcopy(net), rank=2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    pairs = zip(*(student.trainable(twin).values() for twin in twins), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) and torch.equal(torch.get_rng_state(), state)


def test_fused_is_the_same_student_and_comes_apart_bit_for_bit(net, inputs):
    trained(net, inputs, alpha=3.0).eval()
    names = list(student.trainable(net))
    apart = network.call(net, inputs.x, inputs.sigma, inputs.cond)
    student.fuse(net)
    torch.testing.assert_close(network.call(net, inputs.x, inputs.sigma, inputs.cond), apart, rtol=1e-4, atol=1e-5)
    assert list(student.trainable(net)) == names and state_of(net).modes == 4
    with pytest.raises(ValueError, match=r"fused. Call arcflow.student.unfuse"), student.teacher(net):
        pass
    student.unfuse(net)
    assert torch.equal(network.call(net, inputs.x, inputs.sigma, inputs.cond), apart)


@pytest.mark.parametrize("fused", [False, True])
def test_removed_leaves_the_base_as_it_was(net, inputs, fused):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    u = network.call(net, inputs.x, inputs.sigma, inputs.cond)
    trained(net, inputs)
    if fused:
        student.fuse(net)
    student.remove(net.eval())
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(network.call(net, inputs.x, inputs.sigma, inputs.cond), u)
    assert all(p.requires_grad for p in net.parameters()) and not is_student(net)
    student.build(net, modes=2, rank=2)  # and it can begin anew


def test_a_bfloat16_base_keeps_its_teacher_view_and_trains_in_float32(pipe, inputs):
    pipe.transformer.to(torch.bfloat16)
    cond = {k: v.bfloat16() if v.is_floating_point() and k != "guidance" else v for k, v in inputs.cond.items()}
    u = network.call(pipe.transformer, inputs.x, inputs.sigma, cond)
    student.build(pipe.transformer, modes=4, rank=2)
    perturb(pipe.transformer)
    m = student.predict(pipe.transformer, inputs.x, inputs.sigma, cond)
    m.velocity(0.1).square().mean().backward()
    named = student.trainable(pipe.transformer)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in named.values())
    assert torch.equal(views.teacher_velocity(pipe.transformer, inputs.x, inputs.sigma, cond), u.float())


def test_without_lora_only_head_and_norm_are_tuned(net):
    student.build(net, modes=2, lora=False)
    assert {name.split(".")[0] for name in student.trainable(net)} == {
        "norm_out",
        "proj_out_means",
        "proj_out_logweights",
        "proj_out_loggamma",
    }


def test_nonsense_is_refused_with_a_remedy(net, inputs):
    with pytest.raises(ValueError, match="plain base, not a student; attach an adapter"):
        student.predict(net, inputs.x, inputs.sigma, inputs.cond)
    with pytest.raises(ValueError, match="at least 1 .*or lora=False"):
        student.build(net, rank=0)
    assert not is_student(net) and all(p.requires_grad for p in net.parameters())
    student.build(net, rank=2)
    with pytest.raises(ValueError, match=r"student already; call arcflow.student.remove"):
        student.build(net, rank=2)


def test_a_whole_path_is_not_mixed_with_a_lora_on_the_last_layer(net, inputs):
    net.add_adapter(LoraConfig(target_modules=["proj_out"]), "style")
    student.build(net, modes=2, rank=2)
    with pytest.raises(ValueError, match=r"'style'.* on 'proj_out'.*expected that layer free.*pipe.disable_lora\(\)"):
        student.predict(net, inputs.x, inputs.sigma, inputs.cond)
    net.disable_adapters()  # which `pipe.disable_lora` calls
    assert student.predict(net, inputs.x, inputs.sigma, inputs.cond).v.isfinite().all()
    net.enable_adapters()
    styled = views.teacher_velocity(net, inputs.x, inputs.sigma, inputs.cond)
    student.remove(net)
    assert torch.equal(network.call(net, inputs.x, inputs.sigma, inputs.cond), styled)
