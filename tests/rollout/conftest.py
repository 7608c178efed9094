"""One tiny policy and two engines on it, one of them drafting, shared by the whole folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.policy.checkpoint import save
from posttrain.rollout.engine import Engine
from tests.rollout.tiny import Settings, Tiny


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout") / "checkpoint"
    save(Tiny.policy(0), None, folder)
    return folder


@pytest.fixture(scope="session")
def engine(saved: Path) -> Iterator[Engine]:
    """Drafts one token; what it holds changes from test to test."""
    engine = Engine.start(saved, Settings())
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def plain_engine(saved: Path, engine: Engine) -> Iterator[Engine]:
    """Does not draft. Lives beside the drafting one."""
    engine = Engine.start(saved, Settings(num_speculative_tokens=0))
    yield engine
    engine.close()
