import socket

import pytest
from huggingface_hub import constants

from ssmtune import hub
from ssmtune.config import ConfigError
from ssmtune.data import load_examples
from ssmtune.models import load_model


@pytest.fixture
def no_network(monkeypatch):
    """No way out; counts the tries."""
    tries = []

    def refuse(*arguments, **_):
        tries.append(arguments)
        raise OSError("no route")

    hub.hub_is_reachable.cache_clear()
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tries
    hub.hub_is_reachable.cache_clear()


def test_names_on_the_hub_fail_at_once_without_a_network(no_network):
    with pytest.raises(ConfigError, match="could not be read from the hub") as caught:
        load_model("someone/mamba-that-is-nowhere")
    assert len(str(caught.value).splitlines()) == 3
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_examples("someone/poems-that-are-nowhere")
    assert len(no_network) == 1
    assert constants.HF_HUB_OFFLINE is False


def test_local_models_do_not_ask_for_the_hub(no_network, tiny_checkpoint):
    load_model(tiny_checkpoint)
    assert no_network == []


def test_a_proxy_leaves_the_question_to_the_client(no_network, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert hub.hub_is_reachable() and no_network == []


def test_offline_by_choice_is_not_asked(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_is_reachable() and no_network == []
