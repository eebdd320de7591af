"""Writes `workflows/*.json`, in the form that ComfyUI opens, each with a picture of its graph beside it.

    python integrations/comfyui/tests/make_workflows.py

A graph is written down as nodes with their inputs: a value, or (node, output). `test_workflows.py` holds every name
against a real ComfyUI.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "workflows"

Inputs = dict[str, Any]

Graph = dict[str, tuple[str, Inputs]]
"""Name of a node -> its class, and its inputs in order."""

CONTROLS = {("KSampler", "seed"): "fixed", ("LoadImage", "image"): "image"}
"""Widgets that the frontend puts behind another one."""


class Kind(NamedTuple):
    """A class of nodes."""

    links: dict[str, str]
    """Inputs that are wires, and their types."""
    widgets: tuple[str, ...]
    outputs: tuple[str, ...]


def _kind(links: str, widgets: str, outputs: str) -> Kind:
    pairs = [pair.split(":") for pair in links.split()]
    return Kind({name: kind for name, kind in pairs}, tuple(widgets.split()), tuple(outputs.split()))


KINDS: dict[str, Kind] = {
    "UNETLoader": _kind("", "unet_name weight_dtype", "MODEL"),
    "UnetLoaderGGUF": _kind("", "unet_name", "MODEL"),
    "DualCLIPLoader": _kind("", "clip_name1 clip_name2 type device", "CLIP"),
    "CLIPLoader": _kind("", "clip_name type device", "CLIP"),
    "VAELoader": _kind("", "vae_name", "VAE"),
    "ArcFlowApply": _kind("model:MODEL", "adapter strength", "MODEL"),
    "LoraLoaderModelOnly": _kind("model:MODEL", "lora_name strength_model", "MODEL"),
    "ModelSamplingAuraFlow": _kind("model:MODEL", "shift", "MODEL"),
    "CLIPTextEncode": _kind("clip:CLIP", "text", "CONDITIONING"),
    "ConditioningZeroOut": _kind("conditioning:CONDITIONING", "", "CONDITIONING"),
    "FluxGuidance": _kind("conditioning:CONDITIONING", "guidance", "CONDITIONING"),
    "ReferenceLatent": _kind("conditioning:CONDITIONING latent:LATENT", "", "CONDITIONING"),
    "EmptySD3LatentImage": _kind("", "width height batch_size", "LATENT"),
    "EmptyFlux2LatentImage": _kind("", "width height batch_size", "LATENT"),
    "LoadImage": _kind("", "image", "IMAGE MASK"),
    "FluxKontextImageScale": _kind("image:IMAGE", "", "IMAGE"),
    "VAEEncode": _kind("pixels:IMAGE vae:VAE", "", "LATENT"),
    "SetLatentNoiseMask": _kind("samples:LATENT mask:MASK", "", "LATENT"),
    "KSampler": _kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "seed steps cfg sampler_name scheduler denoise",
        "LATENT",
    ),
    "VAEDecode": _kind("samples:LATENT vae:VAE", "", "IMAGE"),
    "SaveImage": _kind("images:IMAGE", "filename_prefix", ""),
}

STYLE = "style.safetensors"


def flux(**changes: tuple[str, Inputs] | None) -> Graph:
    """FLUX.1 from a prompt; nodes may be added, changed or (None) left out."""
    graph: dict[str, tuple[str, Inputs] | None] = {
        "base": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
        "clip": (
            "DualCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "t5xxl_fp16.safetensors",
                "type": "flux",
                "device": "default",
            },
        ),
        "vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "apply": (
            "ArcFlowApply",
            {"model": ("base", 0), "adapter": "arcflow-flux-2steps.safetensors", "strength": 1.0},
        ),
        "text": ("CLIPTextEncode", {"clip": ("clip", 0), "text": "a red fox asleep in deep snow, soft morning light"}),
        "guidance": ("FluxGuidance", {"conditioning": ("text", 0), "guidance": 3.5}),
        "none": ("ConditioningZeroOut", {"conditioning": ("text", 0)}),
        "empty": ("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
        "draw": drawing(("apply", 0)),
        "decode": ("VAEDecode", {"samples": ("draw", 0), "vae": ("vae", 0)}),
        "save": ("SaveImage", {"images": ("decode", 0), "filename_prefix": "arcflow"}),
    }
    return {name: node for name, node in (graph | changes).items() if node}


def drawing(model: tuple[str, int], **changes: Any) -> tuple[str, Inputs]:
    """KSampler as a student wants it."""
    inputs: Inputs = {
        "model": model,
        "positive": ("guidance", 0),
        "negative": ("none", 0),
        "latent_image": ("empty", 0),
        "seed": 0,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return "KSampler", inputs | changes


def image(text: str = "a red fox asleep in deep snow, at night", **changes: tuple[str, Inputs] | None) -> Graph:
    """FLUX.1 from a prompt and a picture."""
    return flux(
        **{
            "empty": None,
            "load": ("LoadImage", {"image": "example.png"}),
            "encode": ("VAEEncode", {"pixels": ("load", 0), "vae": ("vae", 0)}),
            "text": ("CLIPTextEncode", {"clip": ("clip", 0), "text": text}),
        }
        | changes
    )


def other(base: str, clip: str, kind: str, vae: str, adapter: str, empty: str, guidance: float | None) -> Graph:
    """Another family from a prompt."""
    node = ("FluxGuidance", {"conditioning": ("text", 0), "guidance": guidance}) if guidance else None
    positive = ("guidance", 0) if guidance else ("text", 0)
    return flux(
        base=("UNETLoader", {"unet_name": base, "weight_dtype": "default"}),
        clip=("CLIPLoader", {"clip_name": clip, "type": kind, "device": "default"}),
        vae=("VAELoader", {"vae_name": vae}),
        apply=("ArcFlowApply", {"model": ("base", 0), "adapter": adapter, "strength": 1.0}),
        guidance=node,
        empty=(empty, {"width": 1024, "height": 1024, "batch_size": 1}),
        draw=drawing(("apply", 0), positive=positive),
    )


WORKFLOWS: dict[str, Graph] = {
    "flux_text": flux(),
    "flux_image_to_image": image(draw=drawing(("apply", 0), latent_image=("encode", 0), denoise=0.5)),
    "flux_inpaint": image(
        mask=("SetLatentNoiseMask", {"samples": ("encode", 0), "mask": ("load", 1)}),
        draw=drawing(("apply", 0), latent_image=("mask", 0)),
    ),
    "flux_kontext": image(
        "the same fox, now awake and yawning",
        base=("UNETLoader", {"unet_name": "flux1-dev-kontext.safetensors", "weight_dtype": "default"}),
        fit=("FluxKontextImageScale", {"image": ("load", 0)}),
        encode=("VAEEncode", {"pixels": ("fit", 0), "vae": ("vae", 0)}),
        reference=("ReferenceLatent", {"conditioning": ("text", 0), "latent": ("encode", 0)}),
        guidance=("FluxGuidance", {"conditioning": ("reference", 0), "guidance": 3.5}),
        draw=drawing(("apply", 0), latent_image=("encode", 0)),
    ),
    "flux_lora": flux(
        style=("LoraLoaderModelOnly", {"model": ("apply", 0), "lora_name": STYLE, "strength_model": 0.8}),
        draw=drawing(("style", 0)),
    ),
    "flux_gguf": flux(base=("UnetLoaderGGUF", {"unet_name": "flux1-dev-Q8_0.gguf"})),
    "flux_plain_lora_stock_nodes": flux(
        apply=(
            "LoraLoaderModelOnly",
            {"model": ("base", 0), "lora_name": "arcflow_lora.safetensors", "strength_model": 1.0},
        ),
        shift=("ModelSamplingAuraFlow", {"model": ("apply", 0), "shift": 3.2}),
        draw=drawing(("shift", 0)),
    ),
    "flux2_text": other(
        *("flux2-dev.safetensors", "mistral_3_small_flux2_bf16.safetensors", "flux2", "flux2-vae.safetensors"),
        *("arcflow-flux2-2steps.safetensors", "EmptyFlux2LatentImage", 4.0),
    ),
    "qwen_image_text": other(
        *("qwen_image_bf16.safetensors", "qwen_2.5_vl_7b.safetensors", "qwen_image", "qwen_image_vae.safetensors"),
        *("arcflow-qwen-2steps.safetensors", "EmptySD3LatentImage", None),
    ),
}


def depth(graph: Graph, name: str) -> int:
    """Number of wires on the longest way to a node."""
    return max((depth(graph, value[0]) + 1 for value in graph[name][1].values() if isinstance(value, tuple)), default=0)


def written(graph: Graph) -> dict[str, Any]:
    """The JSON that ComfyUI's frontend opens."""
    names = sorted(graph, key=lambda name: depth(graph, name))
    number = {name: i for i, name in enumerate(names, 1)}
    links: list[list[Any]] = []
    nodes: dict[str, dict[str, Any]] = {}
    tops: dict[int, int] = {}
    for name in names:
        kind, inputs = graph[name]
        wires, widgets, outputs = KINDS[kind]
        column = depth(graph, name)
        height = 70 + 24 * (max(len(wires), len(outputs)) + len(widgets))
        values: list[Any] = []
        for widget in widgets:
            values.append(inputs[widget])
            values += [CONTROLS[kind, widget]] if (kind, widget) in CONTROLS else []
        nodes[name] = {
            "id": number[name],
            "type": kind,
            "pos": [60 + 330 * column, 60 + tops.get(column, 0)],
            "size": [290, height],
            "flags": {},
            "order": number[name] - 1,
            "mode": 0,
            "inputs": [{"name": wire, "type": what, "link": None} for wire, what in wires.items()],
            "outputs": [{"name": what, "type": what, "links": [], "slot_index": i} for i, what in enumerate(outputs)],
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        tops[column] = tops.get(column, 0) + height + 60
    for name in names:
        for slot, wire in enumerate(nodes[name]["inputs"]):
            source, output = graph[name][1][wire["name"]]
            link = [len(links) + 1, number[source], output, number[name], slot, wire["type"]]
            links.append(link)
            wire["link"] = link[0]
            nodes[source]["outputs"][output]["links"].append(link[0])
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def picture(workflow: dict[str, Any], path: Path) -> None:
    """Nodes as boxes, wires between them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    nodes = {node["id"]: node for node in workflow["nodes"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 60
    low = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + 60
    figure, axes = pyplot.subplots(figsize=(right / 150, low / 150), facecolor="#222")
    axes.set(xlim=(0, right), ylim=(low, 0))
    axes.axis("off")
    for _, source, output, target, slot, _ in workflow["links"]:
        x0, y0 = nodes[source]["pos"][0] + 290, nodes[source]["pos"][1] + 45 + 24 * output
        x1, y1 = nodes[target]["pos"][0], nodes[target]["pos"][1] + 45 + 24 * slot
        axes.plot([x0, (x0 + x1) / 2, (x0 + x1) / 2, x1], [y0, y0, y1, y1], color="#8ab", lw=0.8, zorder=0)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        own = node["type"].startswith("ArcFlow")
        box = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,rounding_size=10", fc="#357" if own else "#444", lw=0
        )
        axes.add_patch(box)
        axes.text(x + 10, y + 24, node["type"], color="w", fontsize=5.5, weight="bold")
        shown = [str(value)[:44] for value in node["widgets_values"]]
        top = y + 48 + 24 * max(len(node["inputs"]), len(node["outputs"]))
        for i, value in enumerate(shown):
            axes.text(x + 10, top + 24 * i, value, color="#ccc", fontsize=4.5)
        for i, wire in enumerate(node["inputs"]):
            axes.text(x + 10, y + 48 + 24 * i, wire["name"], color="#9bd", fontsize=4.5)
        for i, wire in enumerate(node["outputs"]):
            axes.text(x + width - 10, y + 48 + 24 * i, wire["name"], color="#9bd", fontsize=4.5, ha="right")
    figure.savefig(path, dpi=120, bbox_inches="tight", pil_kwargs={"quality": 80})
    pyplot.close(figure)


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, graph in WORKFLOWS.items():
        workflow = written(graph)
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", "utf-8")
        picture(workflow, FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
