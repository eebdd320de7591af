"""Nodes for `serve.py` alone: the small world's teacher as a MODEL, its text encoders and its autoencoder.

They stand for the loaders of ComfyUI, which know models of one size only. What is tried, the nodes of `arcflow_nodes`,
KSampler and everything behind it, is as users have it.
"""

from functools import cache
from typing import Any

import host
import torch
from comfy_api.v0_0_2 import ComfyExtension, io
from einops import rearrange

from arcflow.families import network
from arcflow.sampling.open import open_pipe

host.nodes()
from cases import model_of  # noqa: E402  # which imports the nodes by this name

SIDE = 64


@cache
def pipeline() -> Any:
    """The teacher's pipeline."""
    return open_pipe("world", "cpu", "float32")


class WorldModel(io.ComfyNode):
    """The teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ArcFlowTestModel",
            category="test",
            inputs=[],
            outputs=[io.Model.Output(), io.Latent.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        rows = SIDE // pipeline().vae_scale_factor
        channels = pipeline().vae.config.latent_channels
        return io.NodeOutput(
            model_of("flux", pipeline().transformer), {"samples": torch.zeros(1, channels, rows, rows)}
        )


class WorldText(io.ComfyNode):
    """A prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ArcFlowTestText",
            category="test",
            inputs=[io.String.Input("text")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        cond = network.encode_prompts(pipeline(), [text], height=SIDE, width=SIDE)
        more = {"pooled_output": cond["pooled_projections"], "guidance": 3.5}
        return io.NodeOutput([[cond["encoder_hidden_states"], more]])


class WorldDecode(io.ComfyNode):
    """Latents to a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ArcFlowTestDecode",
            category="test",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        tokens = rearrange(samples["samples"], "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        return io.NodeOutput(torch.from_numpy(network.decode(pipeline(), tokens, SIDE, SIDE)).float() / 255)


class Extension(ComfyExtension):
    """All of them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [WorldModel, WorldText, WorldDecode]


async def comfy_entrypoint() -> Extension:
    return Extension()
