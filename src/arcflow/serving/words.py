"""What a stock pipeline is told of the text: words, or embeddings by the names that it has for them."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from arcflow.families.conditioning import Cond, masked
from arcflow.families.family import Family
from arcflow.serving.arguments import Words, known_to
from arcflow.serving.order import Order, Piece

EMBEDDINGS = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}
"""What a text encoder gives: its name in `families`, and in a stock pipeline's call."""

MASK = "encoder_hidden_states_mask"
"""Name in `families` of the mask that says which tokens of the text there are."""

MASKS = ("prompt_embeds_mask", "prompt_attention_mask")
"""Its names in the calls of stock pipelines; those that know neither take a list of texts, each of its own length."""

SPELLED = ("longcat_image", "lumina2")
"""Families whose pipelines are given words: that of LongCat-Image fails on embedded text alone (diffusers 0.42), and
that of Lumina 2 puts a system prompt before the prompt and none before the negative one. Their text has one length."""

ROUNDED = ("qwen_image", "z_image", "krea2")
"""Families whose text is as long as its words, and whose image stands where it does whatever the length: their text
is padded to round lengths, so that more prompts are drawn together. Others' text stays as it is encoded."""


def spelled(family: Family, order: Order) -> bool:
    """Whether the pipeline encodes the text: with the image to edit, or because it must."""
    return order.task == "edit" or family.name in SPELLED


def words_of(
    pipe: DiffusionPipeline, family: Family, order: Order, pieces: Sequence[Piece], texts: Sequence[tuple[Cond, ...]]
) -> Words:
    """Arguments of the pipeline's call that carry prompts and negative prompts."""
    if order.task == "edit":  # its encoder may read the images too
        negative = {} if order.negative is None else {"negative_prompt": pieces[0].negative}
        return {"prompt": pieces[0].prompt, **negative}
    if spelled(family, order):
        negative = {} if order.negative is None else {"negative_prompt": [piece.negative for piece in pieces]}
        return {"prompt": [piece.prompt for piece in pieces], **negative}
    # some pipelines have an empty text there, which would stand beside the embeddings
    known = known_to(pipe)
    words: Words = {"negative_prompt": None} if "negative_prompt" in known else {}
    mask = next((name for name in MASKS if name in known), None)
    names = EMBEDDINGS if mask is None else {**EMBEDDINGS, MASK: mask}
    for which, before in enumerate(("", "negative_")[: len(texts[0])]):
        conds = [text[which] for text in texts]
        if mask == "prompt_attention_mask":  # Chroma's, which is added to the attention as it is
            conds = [{**cond, MASK: cond[MASK].to(cond["encoder_hidden_states"].dtype)} for cond in conds]
        if MASK in conds[0] and MASK not in names:
            words[f"{before}prompt_embeds"] = [row for cond in conds for row in masked(cond)]
            continue
        words |= {before + names[name]: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
    return words
