"""Keep `sbom.cdx.json`, the list of components in the wheel (CycloneDX 1.6), true to what is installed.

    python deploy/sbom.py FOUND

FOUND is what `cyclonedx-py environment --output-reproducible` wrote about an environment with nothing but the
wheel in it. Addresses and descriptions are left out: they differ from mirror to mirror.
"""

import json
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("sbom.cdx.json")
_INSTALLERS = {"pip", "setuptools"}
_LEFT_OUT = ("description", "externalReferences", "properties")


def essential(found: dict[str, Any]) -> dict[str, Any]:
    """Components with versions, licences and dependencies, without the package itself and the installers."""
    own = found["metadata"]["component"]
    parts = [part for part in found["components"] if part["name"] not in {own["name"], *_INSTALLERS}]
    kept = {own["bom-ref"], *(part["bom-ref"] for part in parts)}
    slim = [{key: value for key, value in part.items() if key not in _LEFT_OUT} for part in (own, *parts)]
    return {
        **{key: found[key] for key in ("$schema", "bomFormat", "specVersion", "version")},
        "metadata": {"component": slim[0]},
        "components": slim[1:],
        "dependencies": [entry for entry in found["dependencies"] if entry["ref"] in kept],
    }


def main(path: Path) -> int:
    """Write what was found, if it is another list than the one that is kept."""
    text = json.dumps(essential(json.loads(path.read_text(encoding="utf-8"))), indent=1) + "\n"
    if KEPT.exists() and KEPT.read_text(encoding="utf-8") == text:
        return 0
    KEPT.write_text(text, encoding="utf-8")
    print(f"{KEPT} did not list what is installed; it does now: commit it, and make the release again")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
