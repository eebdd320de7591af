"""Nothing here is imported by the process that only hands tests out to others (`-n auto`): it would take seconds."""

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if hands_out:
        return
    # What is imported and collected stays to the end: to look through it for garbage again and again takes seconds.
    gc.disable()
    # Not at the top: shapes are checked in what is imported after the options are read.
    from tests.support import fixtures

    config.pluginmanager.register(fixtures, "arcflow_fixtures")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
