#!/usr/bin/env bash
# The study in one command; `./run_all.sh --help` lists what it takes. This part only finds a Python:
# ecgtools.environment.py sees to the packages and then starts ecgtools/runner.py.
set -euo pipefail

root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
suitable='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'

for python in python3 python3.13 python3.12 python3.14 python3.11; do
    if "$python" -c "$suitable" 2>/dev/null; then
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        exec "$python" -P -m ecgtools.environment "$@"
    fi
done

echo "run_all.sh: no Python 3.11 to 3.14 is installed here; install one (Debian or Ubuntu:" \
    "apt install python3 python3-venv) and start again." >&2
exit 2
