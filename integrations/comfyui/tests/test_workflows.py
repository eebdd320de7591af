"""Workflows name nodes, inputs and outputs that a real ComfyUI has."""

import asyncio
import json
import os

import execution
import folder_paths
import make_workflows
import nodes
import pytest
from arcflow_nodes import nodes as ours

OWN = {"ArcFlowApply": ours.ArcFlowApply, "ArcFlowSigmas": ours.ArcFlowSigmas}

OTHERS = {"UnetLoaderGGUF"}
"""Of another package of nodes."""


@pytest.fixture(scope="module")
def known():
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return nodes.NODE_CLASS_MAPPINGS | OWN


@pytest.mark.parametrize("name", make_workflows.WORKFLOWS)
def test_files_are_what_the_graphs_say(name):
    file = make_workflows.FOLDER / f"{name}.json"
    assert json.loads(file.read_text("utf-8")) == json.loads(
        json.dumps(make_workflows.written(make_workflows.WORKFLOWS[name]))
    )
    assert file.with_suffix(".jpg").is_file()


@pytest.mark.parametrize("name", make_workflows.WORKFLOWS)
def test_nodes_take_and_give_what_is_wired(known, name):
    for kind, inputs in make_workflows.WORKFLOWS[name].values():
        links, widgets, outputs = make_workflows.KINDS[kind]
        if kind in OTHERS or (kind == "EmptyFlux2LatentImage" and kind not in known):
            continue
        told = known[kind].INPUT_TYPES()
        takes = {**told["required"], **told.get("optional", {})}
        wired = {key: str(value[0]) for key, value in takes.items() if key in links}
        assert wired == links, kind
        # in the order of the file, which is how the frontend reads values
        assert [key for key in takes if key not in links] == list(widgets), kind
        assert list(inputs) and set(inputs) == set(links) | set(widgets)
        assert [str(one) for one in known[kind].RETURN_TYPES][: len(outputs)] == list(outputs), kind
        for key in ("sampler_name", "scheduler"):
            assert key not in inputs or inputs[key] in takes[key][0]


@pytest.mark.parametrize("name", make_workflows.WORKFLOWS)
def test_comfyui_itself_takes_the_graph(known, name, monkeypatch):
    """By what its server asks of a workflow before it runs: types, ranges, choices, and an output."""
    graph = make_workflows.WORKFLOWS[name]
    kinds = {kind for kind, _ in graph.values()}
    if kinds - set(known):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(kinds - set(known)))}")
    files = sorted({value for _, inputs in graph.values() for value in inputs.values() if isinstance(value, str)})
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", known)
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: files)
    monkeypatch.setattr(folder_paths, "exists_annotated_filepath", lambda name: True)
    monkeypatch.setattr(os, "listdir", lambda path: files)  # of pictures
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    prompt = {
        key: {
            "class_type": kind,
            "inputs": {one: list(value) if isinstance(value, tuple) else value for one, value in inputs.items()},
        }
        for key, (kind, inputs) in graph.items()
    }
    valid, problem, outputs, wrong = asyncio.run(execution.validate_prompt("0", prompt, None))
    assert valid and outputs and not wrong, (problem, wrong)
    prompt["draw"]["inputs"]["sampler_name"] = "no such sampler"
    assert not asyncio.run(execution.validate_prompt("0", prompt, None))[0]
