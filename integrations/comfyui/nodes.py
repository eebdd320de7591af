"""The two nodes. Their ids are in people's workflows: names that are shown may change, ids may not."""

import os

import folder_paths
import torch
from comfy_api.v0_0_2 import ComfyExtension, io

from .adapter import read
from .patch import adapter_of, patched
from .portable import step_grid


class ArcFlowApply(io.ComfyNode):
    """MODEL and adapter in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node takes and gives."""
        return io.Schema(
            node_id="ArcFlowApply",
            display_name="Apply ArcFlow adapter",
            category="loaders/arcflow",
            description="A model that draws in 2 to 4 steps. Sample it with KSampler: euler, simple, cfg 1.",
            inputs=[
                io.Model.Input("model", tooltip="The adapter's base, in any precision, with or without LoRAs."),
                io.Combo.Input(
                    "adapter",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The adapter's .safetensors file in the folder of LoRAs.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the adapter's LoRA; its last layer is always whole. Leave it at 1.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, model: io.Model.Type, adapter: str, strength: float) -> tuple[int, int] | None:
        """What changes when the file does, so that one that was replaced is read again."""
        path = folder_paths.get_full_path("loras", adapter)
        told = os.stat(path) if path else None
        return told and (told.st_mtime_ns, told.st_size)

    @classmethod
    def execute(cls, model: io.Model.Type, adapter: str, strength: float) -> io.NodeOutput:
        """The model with the adapter on it; the one that came in stays as it is."""
        found = read(folder_paths.get_full_path_or_raise("loras", adapter))
        return io.NodeOutput(patched(model, found, strength))


class ArcFlowSigmas(io.ComfyNode):
    """The adapter's own noise levels, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node takes and gives."""
        return io.Schema(
            node_id="ArcFlowSigmas",
            display_name="ArcFlow steps",
            category="sampling/custom_sampling/schedulers",
            description="Noise levels that the adapter was distilled for. KSampler's 'simple' gives the same ones, but "
            "for adapters whose last step has another length.",
            inputs=[
                io.Model.Input("model", tooltip="A model with an ArcFlow adapter on it."),
                io.Int.Input("steps", default=2, min=1, max=100),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, steps: int, denoise: float) -> io.NodeOutput:
        """The last `steps` of as many as it takes for them to be this share of the way, as KSampler does it."""
        adapter = adapter_of(model)
        if adapter is None:
            raise ValueError(
                "'ArcFlow steps' was given a model without an ArcFlow adapter; put 'Apply ArcFlow adapter' before it."
            )
        grid = step_grid(int(steps / denoise), adapter.shift, adapter.final_step_scale)
        return io.NodeOutput(torch.as_tensor(grid[-(steps + 1) :]))


class ArcFlowExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Both nodes."""
        return [ArcFlowApply, ArcFlowSigmas]


async def comfy_entrypoint() -> ArcFlowExtension:
    """Where ComfyUI comes in."""
    return ArcFlowExtension()
