"""What `import fedmosaic` gives, and that it costs nothing until it is used."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedmosaic as fm
from fedmosaic.client.client import Client
from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.consortium import create_federation
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.statement.build import statement
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError

ALLOWED_SECONDS = 0.15


def test_the_public_names_are_these() -> None:
    names = {"Client", "CoLoraConfig", "FedMosaicError", "Server", "create_federation", "privacy"}
    assert set(fm.__all__) == names | {"__version__"}
    assert names <= set(dir(fm))
    assert set(fm.privacy.__all__) == {"GaussianEvent", "Ledger", "epsilon", "privacy_statement"}
    assert set(fm.privacy.__all__) <= set(dir(fm.privacy))


def test_each_name_is_the_thing_itself() -> None:
    assert (fm.Client, fm.CoLoraConfig, fm.create_federation) == (Client, CoLoraConfig, create_federation)
    assert fm.FedMosaicError is FedMosaicError
    assert (fm.privacy.epsilon, fm.privacy.GaussianEvent) == (epsilon, GaussianEvent)
    assert (fm.privacy.Ledger, fm.privacy.privacy_statement) == (Ledger, statement)


@pytest.mark.parametrize("module", [fm, fm.privacy], ids=["fedmosaic", "privacy"])
def test_other_names_are_errors_of_the_usual_kind(module: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Clint'"):
        _ = module.Clint  # type: ignore[attr-defined]  # wrong on purpose


def test_a_federation_is_founded_from_its_file(tmp_path: Path) -> None:
    config = tmp_path / "federation.toml"
    config.write_text('federation = "clinics"\nmembers = [{id = "a"}]\n')
    with pytest.raises(ConfigurationError, match=r"federation\.toml"):
        fm.create_federation(str(config), out=str(tmp_path / "federation"))
    assert not (tmp_path / "federation").exists()


def test_importing_loads_nothing_of_ours_and_nothing_large() -> None:
    code = (
        "import sys, fedmosaic, fedmosaic.privacy\n"
        "heavy = {'torch', 'transformers', 'peft', 'grpc', 'numpy', 'scipy', 'pydantic'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('fedmosaic.')} - {'fedmosaic.privacy'}\n"
        "assert not heavy | ours, heavy | ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_takes_no_time() -> None:
    def best(code: str) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best("import fedmosaic") - best("") < ALLOWED_SECONDS
