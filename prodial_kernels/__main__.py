"""``python -m prodial_kernels``: the same as ``prodial``."""

from prodial_kernels.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
