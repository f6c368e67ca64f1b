# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: makes .venv and installs the given
# requirements files, unless they are installed and have not changed since.

make_environment() {
    if [ ! -x .venv/bin/python ]; then
        local candidate python=
        for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "$0: needs Python 3.10 or later on the PATH" >&2
            exit 2
        fi
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "$0: $python cannot make a virtual environment; install its venv package" \
                "(on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 2
        fi
    fi

    local file stamp dots status
    for file in "$@"; do
        stamp=.venv/installed-${file//\//-}
        if ! cmp -s "$file" "$stamp"; then
            echo "Installing $file into .venv (PyTorch takes a minute or two) ..." >&2
            while sleep 3 && kill -0 $$ 2>/dev/null; do printf . >&2; done &
            dots=$! status=0
            .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$file" || status=$?
            kill "$dots" && wait "$dots" || echo >&2
            [ "$status" -eq 0 ] || exit "$status"
            cp "$file" "$stamp"
        fi
    done
}
