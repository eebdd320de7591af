"""What is believed of an adapter's files, and what is not."""

import copy
import dataclasses
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import arcflow
from arcflow import cli, student
from arcflow.student import adapter, formats, record
from arcflow.system.text import controls
from tests.support.pipelines import perturb, sample

MUTATIONS = 10_000
QUICK = 150

WAYS_OUT = ("again", "Load the base", "Is this an ArcFlow adapter?", "take an earlier checkpoint")


@pytest.fixture
def made(flux):
    """A small student that has moved."""
    net = student.build(copy.deepcopy(flux.transformer), modes=2, rank=1, generator=torch.Generator().manual_seed(0))
    perturb(net.eval())
    return net


def changed(folder, change):
    """The tensors of a folder in our layout changed, and no checksum: as a file made elsewhere."""
    file, told = (folder / name for name in formats.FILES["arcflow"])
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    told.write_text(json.dumps({**json.loads(told.read_text()), "sha256": {}}))


def put(name, value):
    return lambda tensors: tensors.update({name: value})


BIAS = "norm_out.linear.bias"
WRONG = {
    "integers": (put(BIAS, torch.ones(64, dtype=torch.int64)), f"1 of a type other than F32, F16, BF16: {BIAS} I64"),
    "booleans": (put(BIAS, torch.ones(64, dtype=torch.bool)), f"{BIAS} BOOL"),
    "doubles": (put(BIAS, torch.ones(64, dtype=torch.float64)), f"{BIAS} F64"),
    "eight bits": (put(BIAS, torch.ones(64).to(torch.float8_e4m3fn)), f"{BIAS} F8_E4M3"),
    "not a number": (put(BIAS, torch.full((64,), torch.nan)), f"not finite in {BIAS}"),
    "twice": (put(f"transformer.{BIAS}", torch.ones(64)), f"holds {BIAS} twice"),
    "a name that steers": (put("a\x1b[2Jb", torch.ones(1)), r"1 unknown: a\\x1b\[2Jb"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_weights_of_a_wrong_kind_are_refused_by_name(flux, made, tmp_path, kind):
    change, told = WRONG[kind]
    changed(adapter.save_adapter(made, tmp_path), change)
    with pytest.raises(ValueError, match=told) as refused:
        arcflow.attach(flux, tmp_path)
    assert not controls(str(refused.value))


def test_a_checksum_tells_one_changed_bit(flux, made, tmp_path):
    file = adapter.save_adapter(made, tmp_path) / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"checksums \(SHA-256\) differ"):
            arcflow.attach(flux, path)


def test_an_adapter_from_before_checksums_loads_without_a_word(flux, made, tmp_path, recwarn):
    wanted = sample(arcflow.attach(flux, adapter.save_adapter(made, tmp_path)))
    file, told = (tmp_path / name for name in formats.FILES["arcflow"])
    save_file(load_file(file), file)
    older = {name: value for name, value in json.loads(told.read_text()).items() if name != "sha256"}
    told.write_text(json.dumps(older))
    assert torch.equal(sample(arcflow.attach(arcflow.detach(flux), tmp_path)), wanted) and not recwarn


def test_a_record_edited_on_purpose_counts_without_its_checksum(flux, made, tmp_path):
    told = adapter.save_adapter(made, tmp_path) / "arcflow.json"
    content = json.loads(told.read_text())
    told.write_text(json.dumps({**content, "fingerprint": [], "base": "mine"}))  # does not decide what is drawn
    assert adapter.read_info(tmp_path).base == "mine"
    told.write_text(json.dumps({**content, "shift": 2.0, "sha256": {}}))
    assert arcflow.attach(flux, tmp_path).scheduler.config.shift == 2.0


def test_one_file_is_an_adapter_by_itself(flux, made, tmp_path):
    info = formats.AdapterInfo(steps=3, base="owner/base")
    folder = adapter.save_adapter(made, tmp_path / "folder", info=info)
    file = adapter.save_adapter(made, tmp_path / "file" / "two-steps.safetensors", info=info)
    assert [path.name for path in file.parent.iterdir()] == ["two-steps.safetensors"]
    assert file.read_bytes() == (folder / "adapter.safetensors").read_bytes()
    told = [dataclasses.replace(adapter.read_info(path), sha256={}) for path in (folder, file)]
    assert told[0] == told[1] and told[0].steps == 3
    drawn = [sample(arcflow.attach(flux, path)) for path in (folder, file, f"{tmp_path}:file/two-steps.safetensors")]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="is one file, the layout 'published' has two"):
        adapter.save_adapter(made, file, layout="published")


def test_a_file_without_a_record_says_where_one_would_be(flux, made, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="has no record of an adapter in it; .* Give the folder"):
        arcflow.attach(flux, file)


def test_what_could_not_be_read_is_not_written(unchecked, made, tmp_path):
    for wrong in ({"steps": 0}, {"base": "a\rb"}, {"guidance": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .*; expected"):
            adapter.save_adapter(made, tmp_path, info=formats.AdapterInfo(**wrong))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"modes": 2, "modes": 3}', "'modes' stands there twice"),
        ("[" * 100_000, "is not JSON"),
        ('{"modes": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (record.LARGEST + 1), "expected a record of at most 1048576"),
        ("[]", "holds a list; expected an object"),
    ],
)
def test_a_record_is_bounded_json(made, tmp_path, text, told):
    (adapter.save_adapter(made, tmp_path) / "arcflow.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        adapter.read_info(tmp_path)


def test_every_field_of_a_record_has_a_kind():
    assert set(record.KINDS) == {field.name for field in dataclasses.fields(formats.AdapterInfo)}
    blank = dataclasses.asdict(formats.AdapterInfo(modes=1))
    for name, value in json.loads(json.dumps(blank)).items():
        assert record.KINDS[name][0](value), name


def test_an_adapter_without_a_range_of_guidance_has_a_record_as_before_there_were_any():
    plain, ranged = formats.AdapterInfo(guidance=3.5), formats.AdapterInfo(guidance=3.5, guidance_range=(1.5, 5.0))
    assert "guidance_range" not in record.record_content(plain)
    content = json.loads(json.dumps({**record.record_content(ranged), "modes": 1}))
    assert record.info_of(content, Path("arcflow.json")).guidances == (1.5, 5.0)
    assert plain.guidances == (3.5, 3.5) and formats.AdapterInfo().guidances is None


def test_control_characters_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise ValueError("a\x1b[2Jb\nc")

    monkeypatch.setattr("arcflow.commands.doctor.Doctor.run", refuse)
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    assert capsys.readouterr().err == "arcflow: a\\x1b[2Jb\nc\n"


ZOO = [None, True, False, -1, 0, 1, 10**12, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 2000, "\x1b[2J", [], {}]


def mutated_json(text, rng):
    """A record in which something is another value, another name, gone, or said twice."""
    content = json.loads(text)
    holder = content
    name = rng.choice(list(content))
    if isinstance(content[name], dict) and content[name] and rng.random() < 0.5:
        holder = content[name]
        name = rng.choice(list(holder))
    match rng.randrange(4):
        case 0:
            holder[name] = copy.deepcopy(rng.choice([*ZOO, content]))
        case 1:
            holder[f"{name}x"] = holder.pop(name)
        case 2:
            del holder[name]
        case 3:
            return text.replace("{", '{"' + name + '": ' + json.dumps(rng.choice(ZOO)) + ", ", 1)
    return json.dumps(content)


def mutated_bytes(content, rng):
    """A file with some bytes another value, gone, or come twice."""
    content = bytearray(content)
    head = min(len(content), 8 + struct.unpack("<Q", content[:8])[0] if content[:1] != b"{" else len(content))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(head, len(content)) if rng.random() < 0.5 else len(content))
        match rng.randrange(5):
            case 0 | 1:
                content[at] = rng.randrange(256)
            case 2:
                content[at] ^= 1 << rng.randrange(8)
            case 3:
                del content[at : at + rng.randrange(1, 64)]
            case 4:
                content[at:at] = content[at : at + rng.randrange(1, 64)]
        if len(content) < 16:
            break
    return bytes(content)


def mutated_header(content, rng):
    """A tensor file whose header, still JSON of the length it says, tells something else."""
    size = struct.unpack("<Q", content[:8])[0]
    head = mutated_json(content[8 : 8 + size].decode(), rng).encode()
    return struct.pack("<Q", len(head)) + head + content[8 + size :]


def mutate(path, rng):
    content = path.read_bytes()
    if path.suffix == ".json":
        text = mutated_json(content.decode(), rng).encode() if rng.random() < 0.7 else mutated_bytes(content, rng)
        path.write_bytes(text)
    else:
        path.write_bytes(rng.choice((mutated_bytes, mutated_header))(content, rng))


def deciding(info):
    """What a record says of the images; the base's sizes are only held against the base."""
    free = (*record.FREE, "sizes")
    return {name: value for name, value in dataclasses.asdict(info).items() if name not in free}


def read(transformer, path):
    """What is found there, and the tensors; or the error's words."""
    try:
        found = formats.find(path)
        return deciding(found.info), formats.checked_tensors(transformer, found)
    except ValueError as error:
        return str(error), None


SOME = pytest.param(QUICK, marks=pytest.mark.slow)
ALL = pytest.param(MUTATIONS, marks=pytest.mark.long)


@pytest.mark.parametrize("count", [SOME, ALL])
@pytest.mark.parametrize("layout", ["arcflow", "file", "published"])
def test_a_mutated_adapter_is_one_error_or_the_same(unchecked, flux, made, tmp_path, layout, count):
    good, bad = tmp_path / "two-steps", tmp_path / "two-steps-bad"
    bad.mkdir()
    if layout == "file":
        adapter.save_adapter(made, good / "adapter.safetensors")
    else:
        adapter.save_adapter(made, good, layout=layout)
    names = sorted(path.name for path in good.iterdir())
    wanted, tensors = read(flux.transformer, good / names[0] if layout == "file" else good)
    before = {name: value.clone() for name, value in flux.transformer.state_dict().items()}
    errors = 0
    for seed in range(count):
        rng = random.Random(seed)
        for name in names:
            shutil.copyfile(good / name, bad / name)
        mutate(bad / rng.choice(names), rng)
        told, found = read(flux.transformer, bad / names[0] if layout == "file" else bad)
        if found is None:
            errors += 1
            assert not controls(told) and len(told) < 2000, (seed, told)
            assert any(way in told for way in WAYS_OUT), (seed, told)
        elif layout == "published":  # whose authors give it no checksum
            assert told == wanted and {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in tensors.items()}
            assert all(tensor.isfinite().all() for tensor in found.values()), seed
        else:
            assert told == wanted, seed
            assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found), seed
    assert errors > count / 4
    after = flux.transformer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and len(before) == len(after)
