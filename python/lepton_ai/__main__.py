"""python -m lepton_ai, and the console script: the command line, or one line how to get what it needs."""

import sys


def main() -> None:
    try:
        from lepton_ai.cli import main as run
    except ImportError as error:
        sys.exit(f"lepton: {error}; the command line needs: pip install 'lepton-kernels[ai]'")
    run()


if __name__ == "__main__":
    main()
