"""What a server makes of the small model: images a second, its own cost, its first image, an image as one types.

    python -m benchmarks.serving [throughput engine soak first typing] [--threads 2] [--out FILE.md]

Each part is a line of the table:

    throughput   images a second from 32 clients over HTTP, against the stock pipeline called in a loop in one
                 process; every prompt is a new one, so that nothing is saved by remembering text. The two take turns
    engine       share of the engine's time that is not spent in drawing, with a queue that is never empty
    soak         2000 requests of 32 stock clients, a tenth wrong, a tenth leaving early, on a queue of 64: what becomes
                 of them, and how the memory grows after the first quarter
    first        seconds from `arcflow serve` to the first image, by a client that asks again until it has one
    typing       milliseconds from a key press to an image of what stands there then, or of more, in Chromium

Everything stays on the loopback address, and every part ends by itself.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import torch

from arcflow.sampling.open import settle
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.serving.engine import Engine, WaitingImage
from arcflow.serving.offer import StudioSetup, Watch
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.studio import Studio
from arcflow.system import files, records
from arcflow.system.packages import about, version_of
from arcflow.world.scene import sample_prompts

CLIENTS = 32

Pace = tuple[float, float]
"""Images a second, and CPU seconds of an image."""

Line = tuple[str, str, str]
"""What is measured, what came out, what is to be reached."""


@dataclass(frozen=True)
class Measured:
    """The lines of every part that has run, each with its command and the load before it."""

    lines: dict[str, list[list[str]]]


class Server:
    """`arcflow serve` as a process of its own."""

    def __init__(self, threads: int, *options: str) -> None:
        self.since = time.perf_counter()
        command = [sys.executable, "-c", "from arcflow.cli import main; main()", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        self.lines = list[str]()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def said(self, word: str) -> str:
        """The address in the line that begins with a word, once it was said."""
        while self.process.poll() is None:
            for line in self.lines:
                if line.startswith(word):
                    return next(part.rstrip(",") for part in line.split() if part.startswith("http://"))
            time.sleep(0.005)
        raise RuntimeError("".join(self.lines))

    @property
    def worked(self) -> float:
        """CPU seconds of the process so far, whatever else the machine does."""
        spent = psutil.Process(self.process.pid).cpu_times()
        return spent.user + spent.system

    @property
    def memory(self) -> float:
        """MB that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def stop(self) -> int:
        """End it as a machine does; its exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def served(threads: int, *options: str) -> Iterator[tuple[Server, str]]:
    """A server that is ready, and its address."""
    server = Server(threads, *options)
    try:
        yield server, server.said("ready")
    finally:
        code = server.stop()
    if code:
        raise RuntimeError(f"arcflow serve ended with {code}: {''.join(server.lines)}")


def captions(count: int, seed: int) -> list[str]:
    """So many prompts that the small model understands, each once as far as there are so many."""
    found = dict.fromkeys(prompt.text for prompt in sample_prompts(4 * count, seed=seed))
    return (list(found) * 4)[:count]


# --- the parts


def throughput(threads: int, pictures: int = 128, rounds: int = 5) -> list[Line]:
    """Both ways in turn, a round each."""
    torch.set_num_threads(threads)
    setup = settle(ModelAndAdapter(), Drawing(), Machine(device="cpu"))
    pipe = setup.open()
    pipe.set_progress_bar_config(disable=True)

    def looped(prompts: Sequence[str]) -> Pace:
        start, worked = time.perf_counter(), time.process_time()
        for seed, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed)
            pipe.__call__(
                prompt=prompt,
                num_inference_steps=setup.steps,
                height=setup.height,
                width=setup.width,
                generator=generator,
            )
        count = len(prompts)
        return count / (time.perf_counter() - start), (time.process_time() - worked) / count

    with served(threads) as (server, address), httpx.Client(base_url=address, timeout=120) as web:

        def asked(prompts: Sequence[str]) -> Pace:
            def one(numbered: tuple[int, str]) -> None:
                body = {"prompt": numbered[1], "seed": numbered[0]}
                web.post("/v1/images/generations", json=body).raise_for_status()

            with ThreadPoolExecutor(CLIENTS) as pool:
                start, worked = time.perf_counter(), server.worked
                list(pool.map(one, enumerate(prompts)))
                count = len(prompts)
                return count / (time.perf_counter() - start), (server.worked - worked) / count

        looped(captions(8, 0))
        asked(captions(CLIENTS, 0))
        found = list[tuple[Pace, Pace]]()
        for number in range(rounds):
            prompts = captions(pictures, number + 1)
            found.append((looped(prompts[: pictures // 4]), asked(prompts)))
    loop, clients, ratio = (
        statistics.median(one) for one in zip(*((a, b, b / a) for (a, _), (b, _) in found), strict=True)
    )
    alone, shared, less = (
        statistics.median(one) for one in zip(*((a, b, a / b) for (_, a), (_, b) in found), strict=True)
    )
    return [
        (
            f"images a second, {CLIENTS} clients against the pipeline in a loop",
            f"{clients:.1f} against {loop:.1f}: {ratio:.2f} times",
            "1.5 times",
        ),
        (
            "CPU seconds of an image, the loop's against the server's, HTTP and all",
            f"{alone:.3f} against {shared:.3f}: {less:.2f} times",
            "",
        ),
    ]


class Timed(Studio):
    """A studio that adds up the seconds of its drawing."""

    spent = 0.0

    def draw(self, order: Order, pieces: Sequence[Piece], watch: Watch | None = None) -> list[Drawn]:
        start = time.perf_counter()
        try:
            return super().draw(order, pieces, watch)
        finally:
            self.spent += time.perf_counter() - start


def engine(threads: int, pictures: int = 512) -> list[Line]:
    """All jobs wait from the beginning, so that what is not drawing is the engine."""
    torch.set_num_threads(threads)
    studio = Timed(StudioSetup(device="cpu"))
    own = Engine(lambda: studio, max_waiting=pictures)
    own.start()
    offer = own.ready(120)
    order = Order(
        height=offer.height,
        width=offer.width,
        steps=offer.steps[offer.models[0]],
        model=offer.models[0],
        guidance=offer.guidance[offer.models[0]],
    )
    jobs = [WaitingImage(order, Piece(prompt=prompt, seed=seed)) for seed, prompt in enumerate(captions(pictures, 0))]
    before = studio.spent
    start = time.perf_counter()
    own.submit(jobs)
    for job in jobs:
        job.future.result()
    wall = time.perf_counter() - start
    share = 1 - (studio.spent - before) / wall
    own.close()
    each = 1000 * wall * share / pictures
    return [("the engine's own share of an image's time", f"{share:.2%}, {each:.3f} ms an image", "under 3 %")]


def soak(threads: int, requests: int = 2000, queue: int = 64) -> list[Line]:
    """What becomes of each request; a client obeys Retry-After as OpenAI's does, up to ten times."""
    rng = random.Random(0)
    wrong: list[dict[str, object]] = [
        {"size": "65x64"},
        {"n": 0},
        {"extra_body": {"sed": 1}},
        {"background": "transparent"},
        {"model": "dall-e-3"},
    ]
    kinds = [rng.choices(("good", "wrong", "leaves"), (8, 1, 1))[0] for _ in range(requests)]
    prompts = captions(64, 0)
    ends = Counter[str]()
    memory = list[float]()
    with served(threads, "--max-waiting", str(queue)) as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=10)

        def one(number: int) -> None:
            kind = kinds[number]
            fields: dict[str, object] = {"prompt": prompts[number % 64], "n": 1 + number % 4}
            fields |= {"size": ("64x64", "80x48")[number % 2], "extra_body": {"num_inference_steps": 1 + number % 2}}
            try:
                if kind == "wrong":
                    client.images.generate(**{**fields, **wrong[number % len(wrong)]})  # type: ignore[arg-type]
                elif kind == "leaves":
                    hasty = client.with_options(timeout=0.02 + 0.2 * (number % 7) / 7, max_retries=0)
                    hasty.images.generate(**fields)  # type: ignore[arg-type]
                else:
                    answer = client.images.generate(**fields)  # type: ignore[arg-type]
                    ends["drawn" if answer.data and len(answer.data) == fields["n"] else "cut short"] += 1
                    return
                ends["wrong but drawn" if kind == "wrong" else "stayed"] += 1
            except openai.APITimeoutError:
                ends["left" if kind == "leaves" else "lost"] += 1
            except openai.APIStatusError as error:
                busy = kind == "leaves" and error.status_code == 429
                ends["left" if busy else f"{'4xx' if error.status_code < 500 else '5xx'} of {kind}"] += 1
            except openai.APIConnectionError:
                ends["lost"] += 1
            memory.append(server.memory)

        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(one, range(requests)))
        spent = time.perf_counter() - start
        counted = httpx.get(f"{address}/metrics").text
        after = server.memory
    full = sum(
        float(line.split()[-1]) for line in counted.splitlines() if "requests_total" in line and 'status="429"' in line
    )
    failed = [line for line in counted.splitlines() if "arcflow_requests_total" in line and 'status="5' in line]
    early = statistics.median(memory[len(memory) // 4 : len(memory) // 2] or [after])
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    return [
        (
            f"{requests} requests of {CLIENTS} clients on a queue of {queue}, {spent:.0f} s",
            f"{told}; {full:.0f} times 429; answers 5xx: {len(failed)}",
            "none lost, no 5xx, wrong ones 4xx",
        ),
        ("memory after the run against its second quarter", f"{after:.0f} MB, {after - early:+.0f} MB", "flat"),
    ]


def first(threads: int, rounds: int = 3) -> list[Line]:
    """From the command to an image."""
    found = list[Pace]()
    for _ in range(rounds):
        server = Server(threads)
        address = server.said("listening")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=100)
        client.images.generate(prompt="a red ring")
        found.append((time.perf_counter() - server.since, server.worked))
        server.stop()
    told = ", ".join(f"{clock:.1f}" for clock, _ in sorted(found))
    clock, worked = (statistics.median(one) for one in zip(*found, strict=True))
    return [
        (
            "seconds from `arcflow serve` to the first image",
            f"{clock:.1f} ({told}), of the CPU {worked:.1f}",
            "under 20",
        )
    ]


WATCH = """() => {
    window.keys = []; window.seen = [];
    document.getElementById("prompt").addEventListener("input",
        event => window.keys.push([performance.now(), event.target.value.trim()]), true);
    document.getElementById("big").addEventListener("load",
        event => window.seen.push([performance.now(), event.target.alt]));
}"""


def typing(threads: int, words: Sequence[str] = ()) -> list[Line]:
    """A key is answered by the first image of the words that stand there then, or of later ones."""
    from playwright.sync_api import sync_playwright

    rng = random.Random(0)
    words = words or captions(6, 3)
    found = list[float]()
    with served(threads) as (server, address), sync_playwright() as play:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#big:not([hidden])")
        page.evaluate(WATCH)
        for text in words:
            page.fill("#prompt", "")
            for letter in text:
                page.keyboard.type(letter)
                page.wait_for_timeout(rng.uniform(80, 220))  # as people do
            page.wait_for_timeout(1500)
        keys, seen = page.evaluate("[window.keys, window.seen]")
        browser.close()
    for place, (moment, there) in enumerate(keys):
        until = next((later for later in range(place, len(keys)) if not keys[later][1]), len(keys))
        words_then = {text for _, text in keys[place:until]}
        answered = [when for when, alt in seen if when >= moment and alt.rpartition(", seed")[0] in words_then]
        if there and answered:
            found.append(answered[0] - moment)
    keys_typed = sum(1 for _, there in keys if there)
    middle, late = statistics.median(found), sorted(found)[int(0.95 * len(found))]
    return [
        (
            f"milliseconds from a key press to four images, {keys_typed} keys",
            f"{middle:.0f} in the median, {late:.0f} for 95 %",
            "under 300 in the median",
        )
    ]


PARTS: dict[str, Callable[..., list[Line]]] = {
    "throughput": throughput,
    "engine": engine,
    "soak": soak,
    "first": first,
    "typing": typing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="which of them; all unless given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, help="of the one part: images, requests or rounds; fewer for a glance")
    parser.add_argument("--out", type=Path, help="write the table here; lines of parts that were not run stay")
    options = parser.parse_args()
    kept = options.out.with_suffix(".json") if options.out else Path(tempfile.mkdtemp()) / "lines.json"
    found = records.read(Measured, kept) if kept.exists() else Measured(lines={})
    for part in options.parts:
        more = () if options.count is None else (options.count,)
        words = f"`{part} --threads {options.threads}{''.join(f' --count {count}' for count in more)}`"
        busy = f"{os.getloadavg()[0]:.0f}"  # processes that others had running
        found.lines[part] = [[*line, words, busy] for line in PARTS[part](options.threads, *more)]
        for line in found.lines[part]:
            print(" | ".join(line), flush=True)
    if options.out:
        records.write(kept, found)
        files.write_text(options.out, _page(found))


def table(found: Measured) -> str:
    """The measured parts as a table of Markdown, which docs/serving.md shows as well."""
    rows = [f"| {' | '.join(line)} |" for part in PARTS for line in found.lines.get(part, [])]
    return "\n".join(["| what | measured | to reach | by | load before |", "|---|---|---|---|---|", *rows])


def _page(found: Measured) -> str:
    made = about()
    versions = {**made["versions"], **{name: version_of(name) for name in ("fastapi", "uvicorn", "openai")}}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            "# What a server makes of the small model",
            "",
            table(found),
            "",
            f"Made by `python -m benchmarks.serving`, on {os.cpu_count()} cores of {made['device']}, "
            f"{time.strftime('%Y-%m-%d')}: Python {made['python']}, {told}. The load is the average number of "
            "processes that ran before: clock times are those of a machine that is shared, CPU times are not.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
