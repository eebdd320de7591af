"""What stands at the end of a command's help: lines to copy."""

EXAMPLES = {
    "": (
        "arcflow demo --quick",
        'arcflow sample --prompt "a red ring left of a blue square on white"',
        "arcflow train world-quick --out runs/mine",
        "arcflow doctor",
    ),
    "demo": ("arcflow demo", "arcflow demo --quick --out out/taste"),
    "recipes": ("arcflow recipes", "arcflow recipes --json"),
    "compare": ("arcflow compare --quick", "arcflow compare --only arcflow linear --trainings 5 --out out/two"),
    "completion": ("arcflow completion bash",),
    "train": (
        "arcflow train world-quick --out runs/mine",
        "arcflow train flux --data.prompts prompts.txt --out runs/flux",
        "arcflow train --config runs/mine/run.json --out runs/again",
        "arcflow recipes",
    ),
    "sample": (
        'arcflow sample --prompt "a red ring left of a blue square on white" --seed 1 --seed 2',
        "arcflow sample --model black-forest-labs/FLUX.1-dev \\\n"
        '      --adapter ymyy307/ArcFlow:arcflow-flux-2steps --prompt "a red cube on a blue sphere"',
        "arcflow sample --model black-forest-labs/FLUX.1-dev --adapter none --fit offload \\\n"
        '      --prompt "a red cube"',
        "arcflow sample --prompts prompts.txt --adapter runs/mine/adapter --out out/mine",
        "arcflow sample --ray --prompts prompts.txt --shards s3://bucket/pictures",
    ),
    "evaluate": (
        "arcflow evaluate",
        "arcflow evaluate --adapter runs/mine/adapter --out out/mine",
        "arcflow evaluate --model black-forest-labs/FLUX.1-dev --adapter runs/flux/adapter --prompts a.txt",
        "arcflow evaluate --suite geneval --prompts evaluation_metadata.jsonl \\\n"
        "      --model black-forest-labs/FLUX.1-dev --adapter runs/flux/adapter --out out/geneval",
        "arcflow evaluate --suite world --adapter none --out out/world-teacher",
    ),
    "serve": (
        "arcflow serve",
        "arcflow serve --model black-forest-labs/FLUX.1-dev --adapter ymyy307/ArcFlow:arcflow-flux-2steps",
        "arcflow serve --adapter mine=runs/mine/adapter --adapter world --port 9000",
    ),
    "cache make": (
        "arcflow cache make --prompts prompts.txt --model black-forest-labs/FLUX.1-dev --out embeddings",
        "arcflow cache make --prompts world",
    ),
    "export": (
        "arcflow export --adapter world --out out/world",
        "arcflow export --adapter runs/mine/adapter --push owner/name",
        "arcflow export --adapter runs/mine/adapter --layout lora --out out/lora",
    ),
    "doctor": ("arcflow doctor", "arcflow doctor --model flux"),
}
"""By command; the first ones are for all of them."""


def examples(command: str) -> str:
    """The examples of a command, as they are printed; empty if it has none."""
    lines = "".join(f"  {line}\n" for line in EXAMPLES.get(command, ()))
    shown = f"examples:\n{lines}" if lines else ""
    return shown + (CONFIG if command else "")


CONFIG = "--config FILE reads settings from YAML or JSON (a run.json, say); the line's own go before them.\n"
