"""Workflows name nodes, inputs and outputs that a real ComfyUI has."""

import asyncio
import json

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
