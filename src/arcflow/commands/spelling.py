"""Names of options: old ones that still work for a release, those of other tools, and hints for a slip of the pen."""

from collections.abc import Iterator, Sequence

RENAMED = {
    "sample": {"--seeds": "--seed"},
    "evaluate": {"--seeds": "--images", "--pictures": "--images"},
    "compare": {"--seeds": "--trainings", "--prompts": "--captions", "--pictures": "--images"},
}
"""By command: an option's name in version 0.1, and its name now."""

REPEATED = {("sample", "--seed")}
"""Options that take one value, and may be given several times; several values after one of them are as good."""

FOREIGN: dict[str, dict[str, str]] = {
    "sample": {
        "--num-inference-steps": "--steps",
        "--num-steps": "--steps",
        "--guidance-scale": "--guidance",
        "--cfg": "--true-cfg",
        "--cfg-scale": "--true-cfg",
        "--true-cfg-scale": "--true-cfg",
        "--negative": "--negative-prompt",
        "--batch-size": "--batch",
        "--num-images-per-prompt": "--seed, once for every image",
        "--num-images": "--seed, once for every image",
        "--images": "--seed, once for every image",
        "--generator": "--seed",
        "--resolution": "--height and --width",
        "--size": "--height and --width",
        "--output": "--out",
        "--output-dir": "--out",
        "--outdir": "--out",
        "--text": "--prompt",
        "--prompt-file": "--prompts",
        "--from-file": "--prompts",
        "--pretrained-model-name-or-path": "--model",
        "--base": "--model",
        "--ckpt": "--model",
        "--lora": "--adapter (--teacher-lora for one of the teacher)",
        "--lora-path": "--adapter (--teacher-lora for one of the teacher)",
        "--precision": "--dtype",
        "--mixed-precision": "--dtype",
        "--torch-dtype": "--dtype",
        "--offload": "--fit offload",
        "--cpu-offload": "--fit offload",
        "--enable-model-cpu-offload": "--fit offload",
        "--quantize": "--fit int8 or --fit nf4",
        "--int8": "--fit int8",
        "--nf4": "--fit nf4",
        "--gpu": "--device",
        "--p": "--prompt",
    },
    "train": {
        "--learning-rate": "--optim.lr",
        "--lr": "--optim.lr",
        "--lora-rank": "--model.rank",
        "--rank": "--model.rank",
        "--network-dim": "--model.rank",
        "--max-train-steps": "--optim.iterations",
        "--max-steps": "--optim.iterations",
        "--iterations": "--optim.iterations",
        "--train-batch-size": "--optim.batch",
        "--batch-size": "--optim.batch",
        "--batch": "--optim.batch",
        "--gradient-accumulation-steps": "--optim.micro-batch, the images at a time",
        "--num-inference-steps": "--distill.steps",
        "--steps": "--distill.steps",
        "--guidance-scale": "--distill.guidance",
        "--guidance": "--distill.guidance",
        "--resolution": "--data.height and --data.width",
        "--height": "--data.height",
        "--width": "--data.width",
        "--prompts": "--data.prompts",
        "--pretrained-model-name-or-path": "--model.base",
        "--model": "--model.base",
        "--lora": "--model.teacher-lora",
        "--mixed-precision": "--model.dtype",
        "--dtype": "--model.dtype",
        "--quantize": "--model.quantize",
        "--gradient-checkpointing": "--model.gradient-checkpointing",
        "--checkpointing-steps": "--save-every",
        "--save-steps": "--save-every",
        "--validation-steps": "--eval-every",
        "--report-to": "--tracker",
        "--output-dir": "--out",
        "--output": "--out",
    },
}
"""By command: what other tools call an option, and what it is called here."""

FOREIGN["evaluate"] = {**FOREIGN["sample"], **dict.fromkeys(("--num-images-per-prompt", "--num-images"), "--images")}
FOREIGN["evaluate"] |= dict.fromkeys(("--prompt", "--text", "--p"), "--prompts, a benchmark's own file")
del FOREIGN["evaluate"]["--images"]


def modern(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a command line in today's names, what to say about those of before)."""
    command, *rest = words or [""]
    renamed = RENAMED.get(command, {})
    said = list[str]()
    after = list[str]()
    for word in rest:
        option, equals, value = word.partition("=")
        option = option.replace("_", "-") if option.startswith("--") else option
        if option in renamed:
            said.append(f"{option} is called {renamed[option]} now; the old name will go with the next release")
            word = f"{renamed[option]}{equals}{value}"
        after.append(word)
    return [*words[:1], *_one_by_one(command, after)], list(dict.fromkeys(said))


def _one_by_one(command: str, words: Sequence[str]) -> Iterator[str]:
    """The words, with an option that may be repeated before every one of its values."""
    current, taken = "", False
    for word in words:
        if word.startswith("--"):
            current = word
            taken = "=" in word
        elif (command, current.partition("=")[0]) in REPEATED:
            if taken:
                yield current.partition("=")[0]
            taken = True
        yield word


def foreign(words: Sequence[str]) -> str | None:
    """What to say where an option has the name that another tool gives it; None if there is none."""
    command = words[0] if words else ""
    for word in words[1:]:
        name = word.partition("=")[0].replace("_", "-")
        if ours := FOREIGN.get(command, {}).get(name if name.startswith("--") else f"-{name}"):
            return f"arcflow {command}: no {word.partition('=')[0]} here; it is {ours}"
    if command == "sample" and len(words) > 1 and not words[1].startswith("-"):
        return f"arcflow sample: {words[1]!r} stands alone; a prompt follows --prompt, a file of them --prompts"
    return None
