"""Nothing here is imported by the process that only hands tests out to others (`-n auto`): it would take seconds."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tiny")
