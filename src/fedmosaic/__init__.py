"""FedMosaic: private, personalised federated fine-tuning across different models and tasks.

The sub-packages live in folders at the root of the repository and are linked here:
`protos` (the wire), `privacy` (mechanisms, accounting, encryption), `client`, `server`,
`alignment` and `experiments`.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# A checkout without symbolic links (Windows, some archives) has plain files where the links
# should be; the sub-packages are then found at the repository root.
_here = _Path(__file__).parent
if not (_here / "client").is_dir() and (_here.parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_here.parents[1]))
