"""A run's processes from their start to their end, under ``torchrun`` or ``accelerate launch``.

The first rank prints; what goes wrong on another one is told with its number.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers

from g2rl.config import Config, ConfigError
from g2rl.devices import resolve_device
from g2rl.parallel.agree import agree
from g2rl.parallel.ranks import PATIENCE, Ranks
from g2rl.parallel.watch import Watch, is_loss

_COMING = timedelta(minutes=5)
"""How long ranks wait for all to be there; a launcher starts them together."""


class _Terminated(BaseException):
    """The launcher ends this process."""


def train_together(
    read: Callable[[], Config], train: Callable[[Config, Ranks], Any], foreseen: tuple[type[Exception], ...]
) -> Config | int:
    """Train on all ranks.

    Args:
        read: the configuration, as this process finds it.
        train: what each rank does with it.
        foreseen: errors whose message says it all.

    Returns:
        The configuration on rank 0, once all is done; elsewhere, and after an error that all ranks have, an exit
        status. After any other error the process ends here.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        _be_silent()
    signal.signal(signal.SIGTERM, _terminate)
    found = _found(read)
    try:
        store = _connect(found, rank, size)
    except ConfigError as error:
        print(f"g2rl: rank {rank}: {error}", file=sys.stderr)
        return 2
    with Watch(store, rank, size) as watch:
        try:
            config = agree(found)
            resume = shlex.quote(f"resume={config.run_dir}")
            watch.advice = f"; by {resume} the run goes on from its last checkpoint, where it has one"
            if config.dry_run:
                raise ConfigError("dry_run: expected a process of its own, found a launcher")
            ranks = Ranks(rank, size, config.parallel.strategy == "fsdp2")
            train(config, ranks)
            ranks.wait()  # all show signs of life until the last one is done: rank 0 still writes when others do not
        except BaseException as error:  # whatever it is, the others must not wait
            _fail(watch, error, foreseen)
    dist.barrier()  # rank 0, which may have the store, goes when nobody looks into it any more
    dist.destroy_process_group()
    return config if rank == 0 else 0


def _found(read: Callable[[], Config]) -> Config | ConfigError:
    try:
        return read()
    except ConfigError as error:
        return error


def _connect(found: Config | ConfigError, rank: int, size: int) -> dist.Store:
    """Bring the ranks together; returns the store that they share.

    Raises:
        ConfigError: there are more ranks than devices, the port is taken, or not all ranks have come.
    """
    kind = _device_type(found)
    if kind != "cpu":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
        if local >= there:
            raise ConfigError(f"nproc-per-node: expected at most {there} ranks, one a device, found rank {local} here")
        torch.accelerator.set_device_index(local)
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_COMING))
        store = dist.PrefixStore(f"g2rl {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        what = "a free port" if "EADDRINUSE" in str(error) else f"{size} ranks to come together"
        raise ConfigError(f"MASTER_PORT: expected {what} at {address}, found: {str(error).splitlines()[0]}") from error
    return store


def _device_type(found: Config | ConfigError) -> str:
    """Of the devices that the ranks use; a wrong configuration is told once they can agree on that."""
    try:
        return resolve_device(found.model.device).type if isinstance(found, Config) else "cpu"
    except ConfigError:
        return "cpu"


def _fail(watch: Watch, error: BaseException, foreseen: tuple[type[Exception], ...]) -> None:
    """Tell what happened on this rank, and end it, and with it the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may be faster than this is told
    if isinstance(error, KeyboardInterrupt):
        watch.fail("stopped", 130)
    if is_loss(error) or isinstance(error, _Terminated):
        watch.lost(error)
    if isinstance(error, ConfigError):
        watch.fail(str(error), 2)
    if isinstance(error, foreseen):
        watch.fail(str(error), 1)
    traceback.print_exception(error)
    watch.fail(f"{type(error).__name__}: {error}", 1)


def _terminate(*_: object) -> None:
    raise _Terminated("the launcher ended this rank, as it does once another one has failed")


def _be_silent() -> None:
    """Print nothing but what fails."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
