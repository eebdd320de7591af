"""SGLang-Diffusion's transformer and loader on the CPU, of merged folders, against this project's path in diffusers.

    python integrations/sglang/tests/check.py PACKAGES...

PACKAGES are folders with SGLang and what its multimodal part imports, beside this environment's PyTorch. Tiny random
students of FLUX.1, both forms, are exported as merged folders. SGLang's loader resolves the folder's scheduler, ours
through `SGLANG_EXTERNAL_MODEL_PACKAGE`; its transformer takes the folder's weights; a loop of two steps is drawn.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[2]

CLOSE = 1e-5


def main() -> None:
    """Print the differences as JSON; an error if one is too large."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    import torch

    for name in ("nms", "qnms"):  # torchvision's wheels are built for CUDA, and name these operators on import
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import tests.support.pipelines  # noqa: F401  # before other folders `tests` are in reach

    sys.path += [*sys.argv[1:], str(HERE.parent)]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29472", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", "SGLANG_EXTERNAL_MODEL_PACKAGE": "arcflow_sglang"}
    from sglang.multimodal_gen.runtime.distributed import maybe_init_distributed_environment_and_model_parallel
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    args = ServerArgs.__new__(ServerArgs)
    for field in dataclasses.fields(ServerArgs):
        if field.default is not dataclasses.MISSING:
            setattr(args, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            setattr(args, field.name, field.default_factory())
    args.attention_backend = "torch_sdpa"
    args.tp_size = args.sp_degree = args.ulysses_degree = args.ring_degree = args.kv_gather_degree = 1
    args.pipeline_config = SimpleNamespace(flow_shift=None, scheduler_class_override=None)
    set_global_server_args(args)
    maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for form in ("mixture", "coefficients"):
            found |= compared(form, Path(home) / form, args)
    print(json.dumps(found, indent=2))
    assert all(apart < CLOSE for apart in found.values())


def compared(form: str, home: Path, args: Any) -> dict[str, float]:
    """Difference of latents, over the size of the latents, of one student."""
    import torch
    from safetensors.torch import load_file
    from sglang.multimodal_gen.configs.models.dits.flux import FluxArchConfig, FluxConfig
    from sglang.multimodal_gen.runtime.loader.component_loaders.scheduler_loader import SchedulerLoader
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
    from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel
    from sglang.multimodal_gen.runtime.utils.external_model_package import load_external_model_package

    import arcflow
    from arcflow import student
    from arcflow.families import network
    from arcflow.reports import model_card
    from arcflow.student.adapter import save_adapter
    from tests.support import pipelines

    load_external_model_package()
    pipe = pipelines.flux_pipeline()
    pipe.save_pretrained(home / "base")
    net = pipelines.fresh(pipe).transformer
    student.build(net, form=form, modes=4, rank=2)
    pipelines.perturb(net, 0.2)
    adapter = save_adapter(net, home / "adapter")
    folder = model_card.export(str(adapter), home / "merged", layout="merged", base=home / "base")
    cond = network.encode_prompts(pipe, ["a red cube"], height=32, width=32, guidance=3.5)
    noise = network.noise(pipe, [0], 32, 32)
    arcflow.attach(pipe, adapter, guidance=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.5}
    length = cond["encoder_hidden_states"].shape[1]
    with torch.no_grad():
        wanted = pipe("a red cube", latents=noise.clone(), max_sequence_length=length, **size).images

    config = json.loads((folder / "transformer" / "config.json").read_text())
    sizes = {name: value for name, value in config.items() if name in FluxArchConfig.__dataclass_fields__}
    dit = (
        FluxTransformer2DModel(config=FluxConfig(arch_config=FluxArchConfig(**sizes)), hf_config=config).eval().float()
    )
    weights = {}
    for shard in (folder / "transformer").glob("*.safetensors"):
        weights |= load_file(shard)
    loaded(dit, weights)
    scheduler = SchedulerLoader().load_customized(str(folder / "scheduler"), args)
    ids = torch.cat([cond["txt_ids"], cond["img_ids"]])
    x = noise.clone()
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.7)
    with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=None):
        for t in scheduler.timesteps:
            velocity = dit(
                hidden_states=x,
                encoder_hidden_states=cond["encoder_hidden_states"],
                pooled_projections=cond["pooled_projections"],
                timestep=t.expand(1),
                guidance=torch.full((1,), 3500.0),
                freqs_cis=dit.rotary_emb.forward(ids),
            )
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
    apart = float((x - wanted).abs().max() / wanted.abs().max())
    return {f"flux, {form}, {type(dit).__name__} with {type(scheduler).__name__}": apart}


def loaded(dit: Any, weights: dict[str, Any]) -> None:
    """Put the folder's weights where SGLang's own names are."""
    import torch

    parameters = dict(dit.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            place = parameters.pop(name)
            getattr(place, "weight_loader", lambda there, value: there.copy_(value))(place, weight)
    assert not parameters, f"no weights for {sorted(parameters)}"


if __name__ == "__main__":
    main()
