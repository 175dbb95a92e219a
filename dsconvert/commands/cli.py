"""The command line: parse, call, print. Exit codes are in the help of the group."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from dsconvert.base import workers
from dsconvert.base.errors import CheckError, InputError, LimitMissed, is_out_of_memory, system_fault
from dsconvert.base.notes import heard
from dsconvert.base.streams import open_streams
from dsconvert.base.version import VERSION
from dsconvert.commands.bench import bench
from dsconvert.commands.compare import compare
from dsconvert.commands.detect import detect
from dsconvert.commands.evaluate import evaluate
from dsconvert.commands.export import export
from dsconvert.commands.finetune import finetune_command
from dsconvert.commands.info import info
from dsconvert.commands.quantize import quantize
from dsconvert.commands.report import report
from dsconvert.commands.shared import in_options, option, say, warn
from dsconvert.onnxfile.bounds import enforced, left_running


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(VERSION, prog_name="dsconvert")
def cli() -> None:
    """Make a trained YOLOv5 detector several times smaller and faster.

    \b
    dsconvert quantize best.pt --calib images/   convert it to 4-bit DSConv
    dsconvert finetune model.safetensors         train its shifts with labels
    dsconvert export --onnx                      write integer weights as ONNX
    dsconvert eval --data data.yaml              accuracy, size, latency
    dsconvert detect best.onnx photos/           draw the objects it finds
    dsconvert compare best.pt best.onnx photos/  agreement without labels
    dsconvert bench a.onnx b.onnx                speed and memory, side by side
    dsconvert report                             all figures on one page

    \b
    Exit codes: 0 done, 1 a fault of dsconvert, 2 bad input, 3 a limit missed
    (compare --min-agreement, eval --max-map-drop).
    """


cli.add_command(quantize)
cli.add_command(finetune_command)
cli.add_command(export)
cli.add_command(evaluate)
cli.add_command(detect)
cli.add_command(compare)
cli.add_command(bench)
cli.add_command(info)
cli.add_command(report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Bad input gives one sentence and exit code 2; only a fault of dsconvert shows a traceback.
    """
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an escape is better than no output
    said, exhausted, stdout = None, False, sys.stdout
    try:
        with enforced(warn), heard(_warn):
            cli.main(arguments, prog_name="dsconvert", standalone_mode=False)
        sys.stdout.flush()  # the reader may have gone: find out here, not when Python ends
    except InputError as error:
        _fail(error.said(option), 2)
    except LimitMissed as missed:
        say(f"Failed: {missed}")
        sys.exit(3)
    except click.exceptions.Abort:
        _fail("Interrupted.", 130)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        for line in shown.getvalue().splitlines():
            say(line)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _end_unread()
    except SystemExit:
        if sys.stdout is not stdout:  # click's own way out if the reader has gone
            _end_unread()
        raise
    except CheckError as error:
        _fail(str(error), 1)
    except Exception as error:
        if _was_interrupted(error):
            _fail("Interrupted.", 130)
        said, exhausted = system_fault(error), is_out_of_memory(error)
        if said is None:
            traceback.print_exc()
            _fail("This is a fault of dsconvert; please report it with the lines above.", 1)
    if said and exhausted:  # ending normally, libraries would need memory, so they are not asked
        say(f"Error: {in_options(said)}")
        sys.stdout.flush()
        os._exit(2)
    if said:
        _fail(in_options(said), 2)


def _warn(sentence: str) -> None:
    """Print a warning; of several processes under torchrun, only one does."""
    if not workers.number():
        warn(sentence)


def _end_unread() -> NoReturn:
    """End without an error, as the reader has enough (`| head -1`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _was_interrupted(error: BaseException) -> bool:
    """Return whether Ctrl-C became another exception, as in `__set_name__` when classes are made on import."""
    behind = error.__cause__ or error.__context__
    return isinstance(behind, KeyboardInterrupt) or (behind is not None and _was_interrupted(behind))


def _fail(message: str, code: int) -> None:
    say(f"Error: {message}")
    if left_running():  # the libraries' own way to end would wait for it, or take away what it uses
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
