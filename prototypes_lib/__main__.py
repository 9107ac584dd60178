"""`python -m prototypes_lib` and the console script `prototypes`."""

import sys


def main() -> None:
    """Run the command line; without tyro (the extra `cli`) say how to get it."""
    try:
        from prototypes_lib.cli import run_command
    except ModuleNotFoundError as missing:
        if missing.name != "tyro":
            raise
        sys.exit("error: the command line needs tyro: pip install 'prototypes_lib[cli]'")
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
