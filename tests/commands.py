"""Commands called in this process, with what they print."""

import io
from contextlib import redirect_stderr, redirect_stdout

import main
import run_utils


def call(run, *argv):
    """A command's main function: (status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = run([str(arg) for arg in argv])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def call_main(*argv):
    """main.py, as `call`."""
    return call(lambda argv: run_utils.exit_status(lambda: main.main(argv)), *argv)
