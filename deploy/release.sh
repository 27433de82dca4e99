#!/usr/bin/env bash
# `make release`: wheel and sdist, built twice from the commit in different directories, with one hash; the list of
# components checked; the wheel installed into an empty environment, from which a short federation is run.
# Leaves dist/ with SHA256SUMS. Wants network, about 3 GB in the temporary directory, and ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1
umask 022
test -z "$(git status --porcelain)" || { echo "commit or stash first: a release is made of a commit"; exit 1; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build==1.6.1 cyclonedx-bom==7.5.0
for place in one two; do
  mkdir "$work/$place"
  git archive HEAD | tar --extract --directory "$work/$place"
  (cd "$work/$place" && "$work/tools/bin/python" -m build --outdir "$work/$place/dist" . > "$work/$place.log")
done
(cd "$work/one/dist" && sha256sum -- *) > "$work/SHA256SUMS"
(cd "$work/two/dist" && sha256sum --check --quiet "$work/SHA256SUMS")
echo "two builds, one hash:" && cat "$work/SHA256SUMS"

"${PYTHON:-python3}" -m venv "$work/empty"
"$work/empty/bin/pip" install --quiet --constraint constraints.txt "$work"/one/dist/*.whl
"$work/tools/bin/cyclonedx-py" environment --output-reproducible --short-PURLs --pyproject pyproject.toml \
  --output-file "$work/all.json" "$work/empty/bin/python"
"$work/tools/bin/python" deploy/sbom.py "$work/all.json"

# From a directory without the source, so that nothing but the wheel can be what runs.
(cd "$work" && "$work/empty/bin/fedmosaic" demo --rounds 2 --steps 2 --output-dir "$work/runs")
rm -rf dist && mkdir dist && cp "$work"/one/dist/* "$work/SHA256SUMS" dist/
echo "dist/ is the release of $(git log -1 --format=%h)"
