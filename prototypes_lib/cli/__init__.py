"""The command line: prototypes run | train | evaluate | doctor | watch | export | data, each with --help.

A wrong request ends with status 2 and one line on stderr, before any work.
"""

import contextlib
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from prototypes_lib.cli import evaluation
from prototypes_lib.cli.commands import IMAGENET, data, export, paper_run_named, run, train
from prototypes_lib.cli.doctor import doctor
from prototypes_lib.cli.watch import watch
from prototypes_lib.interrupts import Interrupted
from prototypes_lib.settings import Run

INTERRUPTED = 75  # exit status of a run that was asked to stop and saved: run the same again (EX_TEMPFAIL)


def evaluate() -> int:
    """Evaluate a frozen or fine-tuned backbone: one verb for each protocol."""
    raise AssertionError("its verbs are commands of their own")


COMMANDS: dict[str, Callable[..., int]] = {
    "run": run, "train": train, "evaluate": evaluate, "doctor": doctor, "watch": watch, "export": export,
    "data": data,
}  # fmt: skip
EVALUATE: dict[str, Callable[..., int]] = evaluation.VERBS


def run_command(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status.

    What the command says; 2 for a request it cannot take; 75 for a run that was asked to stop and can go on.
    """
    said, argv = io.StringIO(), list(argv)
    try:
        with contextlib.redirect_stderr(said):
            work = _parse(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # --help, or a refusal in a box of several lines
        if ended.code:
            text = _one_line(said.getvalue())
            if argv[:1] == ["evaluate"]:  # tyro knows the first word only of what it is called by
                text = text.replace(" in prototypes ", " in prototypes evaluate ")
            print(f"error: {text}", file=sys.stderr)
        return int(ended.code or 0)
    try:
        return work()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> Callable[[], int]:
    """The command with its arguments, not yet run."""
    if argv[:1] == ["evaluate"]:
        commands, prog, about, argv = EVALUATE, "prototypes evaluate", evaluation.__doc__, argv[1:]
    else:
        commands, prog, about = COMMANDS, "prototypes", __doc__
    run = _defaults(argv)
    deferred = {name: _deferred(command, run) for name, command in commands.items()}
    return tyro.extras.subcommand_cli_from_dict(deferred, prog=prog, description=about, args=argv)


def _defaults(argv: Sequence[str]) -> Run:
    """The run that the other options change: ImageNet's, --small's or a --paper-run's."""
    if "--small" in argv and any(word.startswith(("--paper-run", "--paper_run")) for word in argv):
        raise ValueError("--small and --paper-run both set the defaults of the other options: leave one out")
    if "--small" in argv:
        return Run.small()
    words = [part for word in argv for part in word.split("=", 1)]
    for flag, name in itertools.pairwise(words):
        if flag in ("--paper-run", "--paper_run") and name != "list":
            return paper_run_named(name).run
    return IMAGENET


def _deferred(command: Callable[..., int], run: Run) -> Callable[..., Callable[[], int]]:
    """Parsing and working apart, so that only parsing's messages are rewritten; `run` are a Run's defaults."""

    @functools.wraps(command)
    def parsed(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    signature = inspect.signature(command)
    defaults = [p.replace(default=run) if p.default is IMAGENET else p for p in signature.parameters.values()]
    parsed.__signature__ = signature.replace(parameters=defaults)  # type: ignore[attr-defined]
    return parsed


def _one_line(box: str) -> str:
    """tyro's refusal, a heading and sections between rules, as one line: what is wrong, what there is.

    The frame is drawn in lines or, where the terminal knows only ASCII, left out; the rules are there in both.
    """
    plain = re.sub(r"╭─ (.*?) ─*╮", r"\1\n---", box).translate(str.maketrans("─│╰╯", "-   "))
    heading, *sections = map(_joined, re.split(r"^ *-+ *$\n?", plain, flags=re.MULTILINE))
    said = [text for text in sections if text and not text.startswith(("For full helptext", "Argument helptext"))]
    if not said:
        return heading
    return "; ".join(said) if not said[0].startswith("Expected") else f"{heading}: {'; '.join(said)}"


def _joined(section: str) -> str:
    """The wrapped lines of a section as one, an argument with its help (indented more) in parentheses after it."""
    text, helping = "", False
    for line in section.splitlines():
        inside = len(line) - len(line.lstrip()) >= 8
        if helping and not inside:
            text += "),"
        text += f" ({line.strip()}" if inside and not helping else f" {line.strip()}"
        helping = inside
    text = (text + ")" if helping else text).strip()
    return re.sub(r"Error parsing __\S+: |\.? \(required\)", "", text)
