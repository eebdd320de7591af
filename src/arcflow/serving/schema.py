"""What a client may ask: OpenAI's fields, and ours beside them.

Fields that mean nothing here (`user`, `moderation`, `quality`) are taken and ignored; what would be a lie is refused: a
transparent background, an animated image, an address where none is kept. Unknown fields are refused as OpenAI refuses
them, so that a misspelt one is noticed.
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_WORDS = 4000
"""Characters of a prompt."""

MOST_AT_ONCE = 10
"""Images of one request, as OpenAI's."""

MOST_STEPS = 100

SEEDS = 2**63
"""Seeds are below this."""

Format = Literal["png", "webp", "jpeg"]


class Asked(BaseModel):
    """The fields that generations and edits share."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, max_length=MOST_WORDS)
    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=MOST_AT_ONCE)
    size: str = Field("auto", pattern=r"^(auto|\d{1,5}x\d{1,5})$")
    output_format: Format = "png"
    output_compression: int = Field(100, ge=0, le=100)
    response_format: Literal["b64_json"] | None = "b64_json"
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    quality: str | None = Field(None, max_length=20)
    moderation: str | None = Field(None, max_length=20)
    user: str | None = Field(None, max_length=500)
    safety_identifier: str | None = Field(None, max_length=500)

    seed: int | None = Field(None, ge=0, lt=SEEDS)
    """Seed of the first image; those after it count on."""
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=30, allow_inf_nan=False)
    negative_prompt: str | None = Field(None, max_length=MOST_WORDS)
    true_cfg_scale: float | None = Field(None, ge=1, le=30, allow_inf_nan=False)
    """Guidance against the negative prompt, by a second call."""
    lora: dict[str, float] | None = Field(None, max_length=16)
    """Strengths of styles by name."""

    @field_validator("lora", mode="before")
    @classmethod
    def _read_lora(cls, value: object) -> object:
        if isinstance(value, str):  # a form has only words
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                raise ValueError('expected JSON: {"name": strength}') from None
        return value

    @field_validator("lora")
    @classmethod
    def _bounded(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(-4 <= strength <= 4 for strength in value.values()):
            raise ValueError("expected strengths from -4 to 4")
        return value


class Generation(Asked):
    """`POST /v1/images/generations`."""


class Edit(Asked):
    """`POST /v1/images/edits`, without its images."""

    strength: float | None = Field(None, gt=0, le=1)
    """How much of the noise the image starts from; 1 forgets it."""
    input_fidelity: str | None = Field(None, max_length=20)
