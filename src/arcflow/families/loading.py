"""A teacher's pipeline, on its device and in the precision that a run asks for, and what encodes prompts with it.

The frozen base may be kept in 8 or 4 bits (`model.quantize`), the text encoders too (`model.text_bits`), and these may
stand on a device of their own (`model.text_device`). Libraries: bitsandbytes and torchao through diffusers.
"""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft.tuners.lora import LoraLayer

from arcflow.config import Model
from arcflow.system import hub
from arcflow.system.packages import need
from arcflow.system.processes import Ranks


def load_pipe(model: Model, text: bool = True) -> DiffusionPipeline:
    """The teacher's pipeline: the small one of the package, a folder, or one from the Hub; without `text` its text
    encoders stay where they are. A LoRA of the user's own is part of the teacher."""
    base = model.base
    if base == "world":
        from arcflow.world.teacher import teacher_folder  # only this base needs it

        base = str(teacher_folder())
    check_modular(Path(base), model.base)
    try:
        with hub.explained(model.base), _no_bars(quiet=model.base == "world" or not sys.stderr.isatty()):
            return _load(base, model, text)
    except ValueError:
        if not Path(base).is_dir():  # on the Hub it is seen only now
            check_modular(hub.fetch(base, ["*model_index.json"]), base)
        raise


def check_modular(folder: Path, name: str) -> None:
    """Refuse a folder of modular blocks, as FLUX.3 is published in.

    Raises:
        ValueError: it has the index of modular blocks, and none of a pipeline.
    """
    if (folder / "modular_model_index.json").is_file() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{name!r} is made of modular blocks, which do not say where their text encoders end and the network's "
            f"calls begin: expected a pipeline (model_index.json); arcflow.attach(blocks, adapter) draws with them"
        )


@contextmanager
def _no_bars(*, quiet: bool) -> Iterator[None]:
    """Load without diffusers' and transformers' progress bars, which a small model has no use for, nor a log."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    if quiet:
        ours.disable_progress_bar()
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            ours.enable_progress_bar()
            theirs.enable_progress_bar()


def _load(base: str, model: Model, text: bool) -> DiffusionPipeline:
    parts = list(map(str, DiffusionPipeline.load_config(base))) if model.text_bits or not text else []
    encoders = [name for name in parts if name.startswith("text_encoder")]
    left_out = [] if text else [name for name in parts if name.startswith(("text_encoder", "tokenizer"))]
    short = _stored_short(model, encoders if text else [])
    quantized = {} if short is None else {"quantization_config": short}
    dtype = getattr(torch, model.dtype)
    pipe = DiffusionPipeline.from_pretrained(base, dtype=dtype, **dict.fromkeys(left_out), **quantized)
    return _with_lora(pipe, model.teacher_lora) if model.teacher_lora else pipe


def _with_lora(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline with a LoRA of the user's own on it, all of it or none. It is switched on, and not trained."""
    if not Path(name).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"no LoRA {name!r}: expected a file, a folder or a Hub id; check model.teacher_lora")
    with hub.explained(name):
        parts = {key.partition(".lora")[0] for key in pipe.lora_state_dict(name) if ".lora" in key}
    other = sorted(part for part in parts if getattr(pipe, part.partition(".")[0], None) is None)
    if other:
        raise ValueError(
            f"{name!r} changes what this pipeline lacks ({other[0]}): expected a LoRA on parts that are loaded; with "
            f"data.embeddings text encoders are not, so leave that setting out"
        )
    try:
        pipe.load_lora_weights(name)
        modules = pipe.transformer.named_modules()
        there = {f"transformer.{layer}" for layer, module in modules if isinstance(module, LoraLayer)}
        # layers of text encoders have had other names, which diffusers knows
        missing = {part for part in parts if part.startswith("transformer.")} - there
        wrong = f"it has layers that are not here, as {min(missing)}" if missing else ""
    except (ValueError, RuntimeError) as error:
        wrong = str(error).splitlines()[0]
    if wrong:
        raise ValueError(
            f"the LoRA {name!r} does not fit {type(pipe.transformer).__name__} ({wrong}): expected one made for the "
            f"same base; check model.base and model.teacher_lora"
        )
    return pipe


def _stored_short(model: Model, encoders: list[str]) -> PipelineQuantizationConfig | None:
    """What diffusers needs to know to keep the transformer, or the text encoders, in few bits."""
    if model.quantize == "none" and (model.text_bits is None or not encoders):
        return None
    _check_libraries(model, bool(encoders))
    import diffusers
    import transformers

    compute = getattr(torch, model.dtype)
    mapping = {}
    if model.quantize == "nf4":
        mapping["transformer"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    elif model.quantize != "none":
        quantization = importlib.import_module("torchao.quantization")  # an extra

        kinds = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}
        mapping["transformer"] = diffusers.TorchAoConfig(kinds[model.quantize]())
    if model.text_bits == 4:
        short = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        mapping |= dict.fromkeys(encoders, short)
    elif model.text_bits == 8:
        mapping |= dict.fromkeys(encoders, transformers.BitsAndBytesConfig(load_in_8bit=True))
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _check_libraries(model: Model, encoders: bool) -> None:
    """Whether what stores weights short is here."""
    asked = f"model.quantize = {model.quantize!r}, model.text_bits = {model.text_bits!r}"
    if model.quantize in ("int8", "fp8"):
        need("torchao", asked=asked, install="arcflow[quantized]")
    if model.quantize == "nf4" or (model.text_bits and encoders):
        need("bitsandbytes", asked=asked, install="arcflow[quantized]")
    if model.quantize == "nf4" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ValueError(f"{asked}: expected a GPU, without which bitsandbytes' weights are not made; take int8")


def put_on_device(pipe: DiffusionPipeline, model: Model, device: torch.device, ranks: Ranks) -> DiffusionPipeline:
    """The same pipeline, on its device but for a network that is yet to be shared out, or that came short. What is not
    trained is in evaluation mode: it draws no random numbers."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            text = name.startswith("text_encoder") and model.text_device
            later = name == "transformer" and ranks.mesh is not None
            if not later and not getattr(part, "is_quantized", False):
                part.to(model.text_device if text else device)
            part.eval()
    return pipe
