#!/bin/sh
# OpenAI's own client against the engine with the bundled model. Installs the client into the cache folder, expects
# target/release/plimsoll-engine; arguments go to pytest.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/plimsoll/venv-api
engine=${PLIMSOLL_ENGINE:-$here/../../target/release/plimsoll-engine}
if [ ! -x "$engine" ]; then
    echo "tests/api: $engine is missing; run \`make build\` first" >&2
    exit 1
fi
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
PLIMSOLL_ENGINE=$engine exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$@" "$here"
