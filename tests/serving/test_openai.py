"""The official client against a live server on loopback, on the shipped small model."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from arcflow.serving.app import create_app
from arcflow.serving.engine import Engine
from arcflow.serving.host import Server
from tests.support.served import Toys, picture, serving, small_model, upload

PROMPT = "a red ring left of a square"


def client_of(server, **more) -> openai.OpenAI:
    more = {"api_key": "none", "max_retries": 0, **more}
    return openai.OpenAI(base_url=f"{server.address}/v1", timeout=60, **more)


@pytest.fixture(scope="module")
def studio():
    """The small model as `arcflow serve` opens it."""
    return small_model()


@pytest.fixture(scope="module")
def live(studio):
    with serving(lambda: studio) as (server, engine):
        yield server, engine


@pytest.fixture(scope="module")
def client(live):
    with client_of(live[0]) as client:
        yield client


@pytest.fixture(scope="module")
def web(live):
    with httpx.Client(base_url=live[0].address, timeout=60) as web:
        yield web


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["world", "teacher"]
    assert client.models.retrieve("world").owned_by == "arcflow"


def test_pictures_are_generated(client):
    answer = client.images.generate(prompt=PROMPT, n=2, size="64x64", model="world", extra_body={"seed": 7})
    assert [item.seed for item in answer.data] == [7, 8]
    assert [picture(item).shape for item in answer.data] == [(64, 64, 3)] * 2
    assert (answer.size, answer.background, answer.output_format) == ("64x64", "opaque", "png")
    assert answer.usage.output_tokens == 2 * 16
    assert answer.data[0].calls == 2


def test_a_file_carries_its_recipe_and_draws_the_same_again(client):
    first = client.images.generate(prompt=PROMPT).data[0]
    recipe = Image.open(io.BytesIO(base64.b64decode(first.b64_json))).info
    assert (recipe["prompt"], int(recipe["seed"]), recipe["adapter"]) == (PROMPT, first.seed, "world")
    again = client.images.generate(prompt=PROMPT, extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.b64_json


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(studio, live, client):
    """The same file alone, as one of four, and among thirty that come at the same time."""
    words = ["a ring", "two green squares", "a blue circle on gray"]
    alone = client.images.generate(prompt=PROMPT, extra_body={"seed": 3}).data[0]
    four = client.images.generate(prompt=PROMPT, n=4, extra_body={"seed": 1}).data
    with ThreadPoolExecutor(31) as pool:
        others = [
            pool.submit(client.images.generate, prompt=words[i % 3], extra_body={"seed": i}, timeout=60)
            for i in range(30)
        ]
        among = pool.submit(client.images.generate, prompt=PROMPT, extra_body={"seed": 3}).result().data[0]
        answers = [other.result().data[0] for other in others]
    assert [item.b64_json == alone.b64_json for item in (four[2], among)] == [True, True]
    largest = {widths[-1] for widths in studio.widths.values()}  # 8 where it pays, 1 on a machine that is full
    assert max(item.batch for item in (*answers, among)) in largest


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(client, kind):
    answer = client.images.generate(prompt=PROMPT, output_format=kind, extra_body={"seed": 1})
    file = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert file.format == kind.upper()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the pipeline embeds guidance:UserWarning")
def test_our_own_fields_count(client):
    def drawn(**body):
        return picture(client.images.generate(prompt=PROMPT, extra_body={"seed": 0, **body}).data[0]).astype(int)

    plain = drawn()
    for body in (
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a red circle", "true_cfg_scale": 4.0},
    ):
        assert abs(drawn(**body) - plain).max() > 2, body


def test_the_teacher_is_a_model(client):
    answer = client.images.generate(prompt=PROMPT, model="teacher", extra_body={"seed": 3, "num_inference_steps": 4})
    assert answer.data[0].calls == 4


def test_a_stream_shows_the_picture_after_the_first_step(client):
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 3}))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[0].partial_image_index == 0 and events[1].usage.total_tokens == 32
    before, after = (picture(event).astype(int) for event in events)
    assert 0 < abs(before - after).mean() < 40
    whole = client.images.generate(prompt=PROMPT, extra_body={"seed": 3}).data[0]
    assert whole.b64_json == events[1].b64_json


def test_a_stream_of_an_edit(client):
    events = client.images.edit(image=upload(), prompt=PROMPT, stream=True, partial_images=1)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.fixture(scope="module")
def source(client) -> bytes:
    """An image to be changed."""
    answer = client.images.generate(prompt=f"{PROMPT} on gray", extra_body={"seed": 5})
    return base64.b64decode(answer.data[0].b64_json)


def pixels(file: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


@pytest.mark.slow
def test_the_less_strength_the_more_is_kept_of_a_picture(client, source):
    def far(strength):
        asked = {"seed": 0, "strength": strength, "num_inference_steps": 8}
        answer = client.images.edit(image=source, prompt="a blue ring left of a square on gray", extra_body=asked)
        return abs(picture(answer.data[0]) - pixels(source)).mean()

    assert far(0.2) < far(0.5) < far(1.0)


def test_only_what_is_transparent_in_the_mask_changes(client, source):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    file = io.BytesIO()
    mask.save(file, format="PNG")
    answer = client.images.edit(
        image=source, mask=file.getvalue(), prompt="a red ring and a blue circle on gray", extra_body={"seed": 1}
    )
    changed = abs(picture(answer.data[0]) - pixels(source))
    assert changed[:, :28].mean() < 5 < changed[:, 36:].mean()


@pytest.mark.slow
def test_an_edit_keeps_the_shape_of_its_picture(client):
    answer = client.images.edit(image=upload("gray", (200, 100)), prompt=PROMPT)
    assert answer.size == "96x48"


def test_an_edit_in_json(web):
    address = "data:image/png;base64," + base64.b64encode(upload()).decode()
    answer = web.post("/v1/images/edits", json={"prompt": PROMPT, "image": [{"image_url": address}], "seed": 1})
    assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == 1


WRONG = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x" * 4001}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"size": "65x64"}, "size"),
    ({"size": "4096x64"}, "size"),
    ({"size": "0x64"}, "size"),
    ({"size": "huge"}, "size"),
    ({"background": "transparent"}, "background"),
    ({"output_format": "gif"}, "output_format"),
    ({"response_format": "url"}, "response_format"),
    ({"style": "vivid"}, "style"),
    ({"extra_body": {"seed": -1}}, "seed"),
    ({"extra_body": {"seed": 2**63}}, "seed"),
    ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
    ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps"),
    ({"extra_body": {"guidance_scale": -1}}, "guidance_scale"),
    ({"extra_body": {"true_cfg_scale": 2.0}}, "true_cfg_scale"),
    ({"extra_body": {"lora": {"unheard": 1.0}}}, "lora"),
    ({"extra_body": {"sed": 1}}, "sed"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{p}{i}" for i, (_, p) in enumerate(WRONG)])
def test_a_wrong_field_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": PROMPT, **fields})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": b"no image"}, "image"),
        ({"image": upload()[:100]}, "image"),
        ({"image": upload("red", (5000, 4000))}, "image"),
        ({"image": [upload(), upload()]}, "image"),
        ({"image": upload(), "mask": b"no image"}, "mask"),
        ({"image": upload(), "extra_body": {"strength": "0"}}, "strength"),
        ({"image": upload(), "extra_body": {"lora": "{"}}, "lora"),
    ],
)
def test_a_wrong_picture_is_refused(client, files, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(prompt=PROMPT, **files)
    assert refused.value.param == param


def test_other_errors_have_the_same_shape(client, web):
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert refused.value.code == "model_not_found"
    for answer, status in (
        (web.post("/v1/images/generations", content=b"{"), 400),
        (web.post("/v1/images/generations", json=[1]), 400),
        (web.post("/v1/images/edits", content=b"x", headers={"content-type": "text/plain"}), 400),
        (web.post("/v1/images/generations", json={"prompt": "x" * (1 << 20)}), 413),
        (web.post("/v1/images/generations", content=iter([b"x" * (1 << 19)] * 3)), 413),
        (web.post("/v1/images/edits", content=b"[" * 100_000, headers={"content-type": "application/json"}), 400),
        (web.get("/nowhere"), 404),
        (web.get("/v1/images/generations"), 405),
    ):
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_counted(web, client):
    client.images.generate(prompt="a ring that is new", extra_body={"seed": 0})
    client.images.generate(prompt="a ring that is new", extra_body={"seed": 1})
    assert web.get("/health").json() == {"status": "ok"}
    text = web.get("/metrics").text
    for name in ("requests_total", "waiting", "batch_size_bucket", "batch_seconds_bucket", "text_total"):
        assert f"arcflow_{name}" in text
    hits = next(line for line in text.splitlines() if line.startswith('arcflow_text_total{found="yes"}'))
    assert float(hits.split()[1]) >= 1


def test_page_and_documentation_are_there(web):
    page = web.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "").replace("${location.origin}", "")
    assert web.get("/docs").status_code == 200
    assert "/v1/images/edits" in web.get("/openapi.json").json()["paths"]


# --- on toys: what is hard to bring about with a model


class Gate:
    """Holds batches until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, pieces) -> None:
        self.reached.set()
        assert self.opened.wait(20)


def until(condition) -> None:
    """Wait for something that is about to happen."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_a_full_queue_is_told_when_to_come_back():
    gate = Gate()
    with serving(lambda: Toys(gate), max_waiting=2) as (server, engine), ThreadPoolExecutor(4) as pool:
        with client_of(server) as hasty, client_of(server, max_retries=5) as patient:
            jobs = [pool.submit(hasty.images.generate, prompt="a")]
            assert gate.reached.wait(10)
            jobs += [pool.submit(hasty.images.generate, prompt="a", n=2)]
            until(lambda: len(engine.waiting) == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                hasty.images.generate(prompt="b")
            assert int(refused.value.response.headers["retry-after"]) >= 1
            jobs += [pool.submit(patient.images.generate, prompt="b")]
            time.sleep(0.2)
            gate.opened.set()
            assert all(job.result(20).data for job in jobs)


def test_more_pictures_than_the_queue_holds_are_an_error_not_a_wait():
    with serving(Toys, max_waiting=2) as (server, _), client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="holds 2"):
            client.images.generate(prompt="a", n=3)


@pytest.mark.slow
def test_a_client_that_leaves_is_dropped():
    gate = Gate()
    toys = Toys(gate)
    with serving(lambda: toys) as (server, engine), client_of(server) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.images.generate, prompt="a", extra_body={"seed": 1})
        assert gate.reached.wait(10)
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                client.images.generate(prompt="b", stream=stream, timeout=0.3, extra_body={"seed": 2})
        until(lambda: not engine.waiting)
        gate.opened.set()
        first.result(10)
        client.images.generate(prompt="c", extra_body={"seed": 3})
    assert [seeds for _, seeds in toys.batches] == [[1], [3]]


def test_failures_inside_are_told_and_survived():
    def before(pieces):
        if pieces[0].seed == 1:
            raise RuntimeError("a secret of the house")
        if pieces[0].seed == 2:
            raise MemoryError

    with serving(lambda: Toys(before)) as (server, _), client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.images.generate(prompt="a", extra_body={"seed": 1})
        assert failed.value.status_code == 500 and "secret" not in str(failed.value)
        with pytest.raises(openai.InternalServerError) as failed:
            client.images.generate(prompt="a", extra_body={"seed": 2})
        assert failed.value.status_code == 503 and failed.value.response.headers["retry-after"]
        with pytest.raises(openai.InternalServerError):
            list(client.images.generate(prompt="a", stream=True, extra_body={"seed": 2}))
        assert client.images.generate(prompt="a", extra_body={"seed": 3}).data


def test_a_key_is_asked_for():
    with serving(Toys, api_key="open sesame") as (server, _):
        with client_of(server, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.images.generate(prompt="a")
        with client_of(server, api_key="open sesame") as client:
            assert client.images.generate(prompt="a").data
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_while_it_loads_and_drains_it_says_so():
    gate = threading.Event()

    def opened():
        gate.wait(10)
        return Toys()

    engine = Engine(opened)
    with Server(create_app(engine), "127.0.0.1", 0) as server, client_of(server) as client:
        states = [httpx.get(f"{server.address}/health")]
        with pytest.raises(openai.InternalServerError) as early:
            client.images.generate(prompt="a")
        gate.set()
        engine.ready(10.0)
        states.append(httpx.get(f"{server.address}/health"))
        engine.drain()
        states.append(httpx.get(f"{server.address}/health"))
    assert early.value.status_code == 503 and early.value.response.headers["retry-after"]
    assert [state.status_code for state in states] == [503, 200, 503]
    assert json.loads(states[0].text) == {"status": "loading"}
