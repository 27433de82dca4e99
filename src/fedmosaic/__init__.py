"""FedMosaic: private, personalised federated fine-tuning across different models and tasks.

    import fedmosaic as fm

    fm.create_federation("federation.toml", out="federation")      # on one machine: every kit, once
    fm.Server("federation/server").serve()                         # whoever runs the server
    result = fm.Client("client.toml").run()                        # every client: scores, statement, adapter

    fm.CoLoraConfig(r=16, task_type="CAUSAL_LM")                   # the adapter as a PEFT method
    fm.privacy.epsilon([fm.privacy.GaussianEvent(8, 1, 1)], delta=1e-5)
    fm.FedMosaicError                                              # what everything here raises on purpose

Importing this loads nothing else; each name is loaded when it is first used.

The sub-packages live in folders at the root of the repository and are linked here: `protos` (the wire),
`privacy` (mechanisms, accounting, encryption), `client`, `server`, `alignment`, `experiments` and
`integrations`.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmosaic import privacy as privacy
    from fedmosaic.client.client import Client as Client
    from fedmosaic.client.colora import CoLoraConfig as CoLoraConfig
    from fedmosaic.privacy.federation.consortium import create_federation as create_federation
    from fedmosaic.protos.errors import FedMosaicError as FedMosaicError
    from fedmosaic.server.server import Server as Server

__version__ = "0.1.0"
__all__ = [
    "Client",
    "CoLoraConfig",
    "FedMosaicError",
    "Server",
    "__version__",
    "create_federation",
    "privacy",
]

_PLACES = {
    "Client": "fedmosaic.client.client",
    "CoLoraConfig": "fedmosaic.client.colora",
    "FedMosaicError": "fedmosaic.protos.errors",
    "Server": "fedmosaic.server.server",
    "create_federation": "fedmosaic.privacy.federation.consortium",
}

# A checkout without symbolic links (Windows, some archives) has plain files where the links
# should be; the sub-packages are then found at the repository root.
_here = _Path(__file__).parent
if not (_here / "client").is_dir() and (_here.parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_here.parents[1]))


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    from importlib import import_module

    if name == "privacy":
        return import_module("fedmosaic.privacy")
    if name not in _PLACES:
        raise AttributeError(f"module 'fedmosaic' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
