"""``g2rl``, ``python -m g2rl``, and ``torchrun ... -m g2rl``: the command line."""

import sys


def main() -> int | str:
    """The exit status, or what is missing where the ops alone are installed, or under Windows."""
    try:
        from g2rl.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("g2rl", "g2rl_kernels"):
            raise
        if error.name in ("fcntl", "resource"):
            return f"g2rl: expected Linux, macOS, or WSL under Windows for the trainer, found no {error.name}"
        return (
            f"g2rl: expected what the trainer needs, found no {error.name}; install the package with its extra "
            '`train`, in a checkout by pip install -e ".[train]"'
        )
    return run()


if __name__ == "__main__":
    sys.exit(main())
