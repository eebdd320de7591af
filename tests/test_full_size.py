"""The large models at their true shapes, on the meta device."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))


@pytest.mark.slow
def test_the_share_that_is_trained_is_that_of_the_published_adapters() -> None:
    from benchmarks.full_size import count, transformers

    sizes = {name: count(net) for name, net in transformers().items()}
    published = ("FLUX.1-dev", "Qwen-Image")
    assert {name: (sizes[name].base, sizes[name].trainable) for name in published} == {
        "FLUX.1-dev": (11_901_408_320, 652_405_884),
        "Qwen-Image": (20_430_401_088, 960_687_228),
    }
